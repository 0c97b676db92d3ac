// A row of logits in the shared memory of a cluster: its parts, their way in and out, its sums.
#pragma once

#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/cluster.cuh"
#include "cuda/device.cuh"

namespace eapo::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 3;  // blocks of a multiprocessor at once
constexpr int kStages = 4;    // pieces in which a part arrives
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // values of a vector
template <typename T>
constexpr int kChunk = sizeof(T) == 4 ? 4 : 2;  // vectors of a thread that are summed up at once

// Four bytes of -inf.
template <typename T>
inline constexpr unsigned kNone = 0xff800000u;
template <>
inline constexpr unsigned kNone<__nv_bfloat16> = 0xff80ff80u;
template <>
inline constexpr unsigned kNone<__half> = 0xfc00fc00u;

// The values of four bytes, and back.
template <typename T>
__device__ inline void open_word(unsigned word, float* x) {
  if constexpr (std::is_same_v<T, float>) {
    x[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    x[0] = pair.x;
    x[1] = pair.y;
  }
}

template <typename T>
__device__ inline unsigned close_word(const float* x) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(x[0]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return reinterpret_cast<const unsigned&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    return reinterpret_cast<const unsigned&>(pair);
  }
}

template <typename T>
__device__ inline void open_vector(const uint4& v, float* x) {
  constexpr int kEach = kWide<T> / 4;
  open_word<T>(v.x, x);
  open_word<T>(v.y, x + kEach);
  open_word<T>(v.z, x + 2 * kEach);
  open_word<T>(v.w, x + 3 * kEach);
}

template <typename T>
__device__ inline uint4 close_vector(const float* x) {
  constexpr int kEach = kWide<T> / 4;
  return {close_word<T>(x), close_word<T>(x + kEach), close_word<T>(x + 2 * kEach),
          close_word<T>(x + 3 * kEach)};
}

// Part of a row that one block holds: `count` vectors from entry `first` on. A thread reads and
// writes every kThreads-th of them, which nobody else touches. Pointers to rows are to their part.
template <typename T>
struct Part {
  uint4* kept;
  int first, entries;  // from the first one to the row's end
  int count, whole;    // vectors, and how many the row's end does not cut off

  __device__ Part(void* memory, int vocab, int first, int most)
      : kept(static_cast<uint4*>(memory)), first(first), entries(max(0, vocab - first)) {
    count = min(most, (entries + kWide<T> - 1) / kWide<T>);
    whole = min(count, entries / kWide<T>);
  }

  // Vectors of a stage; a thread has whole chunks of them.
  __device__ int stage_size() const {
    constexpr int kUnit = kChunk<T> * kThreads;
    return (count + kStages * kUnit - 1) / (kStages * kUnit) * kUnit;
  }

  // Vector i if it is before `stop`, else -inf.
  __device__ uint4 vector(int i, int stop) const {
    return i < stop ? kept[i] : uint4{kNone<T>, kNone<T>, kNone<T>, kNone<T>};
  }

  // Whether this thread has an entry of the row.
  __device__ bool owns(int64_t entry) const {
    const int64_t i = (entry - first) / kWide<T>;
    return entry >= first && entry - first < entries && i < count && i % kThreads == threadIdx.x;
  }
  __device__ float at(int64_t entry) const {
    return to_float(reinterpret_cast<const T*>(kept)[entry - first]);
  }

  // Brings vector i of the row at `z` here; behind the row's end it is -inf.
  __device__ void fetch(const T* z, int i) {
    const int start = i * kWide<T>;
    float x[kWide<T>];
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w)
      x[w] = start + w < entries ? to_float(z[start + w]) : minus_infinity();
    kept[i] = close_vector<T>(x);
  }

  // Writes the values of vector i to the row at `out`.
  template <typename Out>
  __device__ void store(Out* out, int i, const float* x) const {
    const int start = i * kWide<T>;
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w)
      if (start + w < entries) out[start + w] = from_float<Out>(x[w]);
  }

  // The same in one or two accesses, for whole vectors of aligned rows.
  __device__ void fetch_fast(const T* z, int i) { copy_async(kept + i, z + i * kWide<T>); }
  template <typename Out>
  __device__ void store_fast(Out* out, int i, const float* x) const {
    if constexpr (sizeof(Out) == sizeof(T)) {
      *reinterpret_cast<uint4*>(out + i * kWide<T>) = close_vector<Out>(x);
    } else {
      static_assert(kWide<T> == 4 && sizeof(Out) == 2);
      *reinterpret_cast<uint2*>(out + i * kWide<T>) = {close_word<Out>(x), close_word<Out>(x + 2)};
    }
  }
};

__device__ inline void wait_for_stage(int stage) {
  switch (stage) {
    case 0: return wait_for_copies<3>();
    case 1: return wait_for_copies<2>();
    case 2: return wait_for_copies<1>();
    default: return wait_for_copies<0>();
  }
}
static_assert(kStages == 4);

// Sums over some logits x, with d = x scale - base in units of ln 2: a distance that one fused
// operation makes of x, and that does not depend on how far the logits lie from 0.
struct Sums {
  float top;     // the largest x
  float base;    // top scale, rounded once; no less than a number whose distances are finite
  float mass;    // sum of 2^d; NaN for a NaN or +inf among the logits
  float moment;  // sum of 2^d d
  float hit;     // the target's x if it is among them, else 0

  __device__ static Sums none() { return {minus_infinity(), kLowest, 0.0f, 0.0f, 0.0f}; }
  __device__ static Sums of(const float4& message, float scale) {
    return {message.x, base_of(message.x, scale), message.y, message.z, message.w};
  }
  __device__ float4 message() const { return {top, mass, moment, hit}; }
  __device__ static float base_of(float top, float scale) { return fmaxf(top * scale, kLowest); }

  // Lets the base follow the largest logit `to`.
  __device__ void raise(float to, float scale) {
    const float before = base;
    top = to;
    base = base_of(to, scale);
    const float shift = before - base, fade = fast_exp2(shift);
    moment = fade * fmaf(shift, mass, moment);
    mass *= fade;
  }
  template <int kCount>
  __device__ void add(const float (&x)[kCount], float scale) {
    float tops[kCount / 2];  // pairs of pairs: few wait for each other
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) tops[i] = fmaxf(x[i], x[i + kCount / 2]);
#pragma unroll
    for (int half = kCount / 4; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) tops[i] = fmaxf(tops[i], tops[i + half]);
    raise(fmaxf(top, tops[0]), scale);
#pragma unroll
    for (float value : x) add(value, scale);
  }
  __device__ void add(float x, float scale) {
    const float d = fmaf(x, scale, -base), weight = fast_exp2(d);
    mass += weight;
    moment = fmaf(weight, fmaxf(d, kFar), moment);  // where the weight is 0, d may be -inf
  }

  static constexpr float kLowest = -1e30f, kFar = -256.0f;
};

// Of all lanes, the same bits in each.
__device__ inline Sums of_warp(Sums sums, float scale) {
  sums.raise(warp_max(sums.top), scale);
  sums.mass = warp_sum(sums.mass);
  sums.moment = warp_sum(sums.moment);
  sums.hit = warp_sum(sums.hit);
  return sums;
}

// Where the sums of a row come together: at the start of every block's shared memory.
struct Meeting {
  static constexpr int kMostBlocks = 8;  // of a portable cluster

  float4 warps[kWarps];
  float4 blocks[2][kMostBlocks];  // of even and odd rows: others may be one row ahead
  Mailbox boxes[2];

  // Sums of the cluster's row number `turn`, the same bits in each of its threads.
  __device__ Sums of_cluster(const Sums& own, float scale, int count, int rank, int turn) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp,
              warp = static_cast<int>(threadIdx.x) / kWarp, side = turn & 1;
    const Sums mine = of_warp(own, scale);
    if (lane == 0) warps[warp] = mine.message();
    __syncthreads();
    if (warp == 0) {
      const Sums block = of_warp(at(warps, lane, kWarps, scale), scale);
      if (lane == 0) boxes[side].expect(count * static_cast<int>(sizeof(float4)));
      if (lane < count) boxes[side].send(&blocks[side][rank], block.message(), lane);
    }
    boxes[side].wait(turn / 2);
    return of_warp(at(blocks[side], lane, count, scale), scale);
  }

 private:
  __device__ static Sums at(const float4* messages, int i, int count, float scale) {
    return i < count ? Sums::of(messages[i], scale) : Sums::none();
  }
};

}  // namespace eapo::cuda
