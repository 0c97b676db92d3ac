// The work of one block on one split of a row's keys, for up to 8 query heads of one key head. Its
// 4 warps take tiles of keys in turn, each with a softmax of its own.
//
// In a warp, kLanes lanes share a key, 16 bytes of it each, so that a warp reads 32 / kLanes whole
// keys in one access. The partial products of kHeads heads are summed over these lanes by halving:
// in the end each lane has the scores of one head, and no exponential is taken twice.
#pragma once

#include "cuda/device.cuh"
#include "paged_attention/args.h"

namespace eapo::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSteps = 4;  // keys a lane has under way

// Where a query row stands: its segment and its position in it.
struct Row {
  int64_t segment;
  int position;

  __device__ int lowest(int window) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
};

__device__ Row find_row(const PagedRowsArgs& args, int64_t row) {
  int64_t low = 0, high = args.segments;  // cu_q[low] <= row < cu_q[high]
  if (row < args.segments && args.cu_q[row] == row && args.cu_q[row + 1] == row + 1) {
    low = row;
    high = row + 1;
  }
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.cu_q[middle] <= row ? low : high) = middle;
  }
  const int64_t left = args.cu_q[low + 1] - row;
  return {low, args.kv_lens[low] - static_cast<int>(left)};
}

// 16 bytes of storage as floats.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 raw;

  __device__ void load(const T* from, bool there) {
    raw = there ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  }
  __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(&raw)[i]); }
};

// Sums value[h] over the kLanes lanes of a group; lane l gets that of head l / (kLanes / kHeads).
template <int kHeads, int kLanes>
__device__ float sum_by_head(float (&value)[kHeads], int lane) {
  int held = kHeads;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int h = 0; h < kHeads / 2; ++h) {
        if (h >= held) break;
        const float sent = upper ? value[h] : value[h + held];
        const float kept = upper ? value[h + held] : value[h];
        value[h] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
      }
    } else {
      value[0] += __shfl_xor_sync(kAllLanes, value[0], offset);
    }
  }
  return value[0];
}

__device__ float guarded(float top) { return top == minus_infinity() ? 0.0f : top; }

template <typename T, int kHeads, int kLanes, int kVectors>
struct Decode {
  static_assert(kHeads <= kLanes && kLanes <= kWarp);
  using Vec = Vector<T>;
  static constexpr int kColumns = Vec::kSize * kVectors;  // of a lane
  static constexpr int kGroups = kWarp / kLanes;          // keys in one access
  static constexpr int kKeys = kGroups * kSteps;          // of a warp's tile
  static constexpr int kDim = kLanes * kColumns;          // >= dim

  struct Shared {
    float weights[kWarps][kKeys][kHeads];
    float top[kWarps][kHeads];
    float sum[kWarps][kHeads];
    float acc[kWarps][kHeads][kDim];
  };

  const PagedRowsArgs& args;
  Shared& shared;
  int warp, lane, group, part;  // part: which lane of its group
  int head;                     // whose scores this lane holds
  int64_t kv_head, first_head, heads;
  int block_shift;  // of a block size that is a power of two, else -1

  float q[kHeads][kColumns];
  float acc[kHeads][kColumns];
  float top = minus_infinity(), sum = 0.0f;

  __device__ Decode(const PagedRowsArgs& args, Shared& shared, int64_t kv_head, int64_t tile)
      : args(args), shared(shared), kv_head(kv_head) {
    warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    group = lane / kLanes;
    part = lane % kLanes;
    head = part / (kLanes / kHeads);
    const int64_t group_heads = args.q_heads / args.kv_heads;
    const int size = args.block_size;
    block_shift = (size & (size - 1)) == 0 ? 31 - __clz(size) : -1;
    first_head = kv_head * group_heads + tile * kHeads;
    heads = min(static_cast<int64_t>(kHeads), group_heads - tile * kHeads);
  }

  __device__ int block_of(int key) const {
    return block_shift >= 0 ? key >> block_shift : key / args.block_size;
  }

  // First of the lane's columns in vector v, the lanes of a group side by side.
  __device__ int column(int v) const { return (v * kLanes + part) * Vec::kSize; }

  __device__ void load_query(int64_t row) {
    const T* source = static_cast<const T*>(args.q) + row * args.q_stride + first_head * args.dim;
    const float factor = args.softcap > 0 ? args.scale / args.softcap : args.scale * kLog2e;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vec vec;
        vec.load(source + h * args.dim + column(v), h < heads && column(v) < args.dim);
#pragma unroll
        for (int i = 0; i < Vec::kSize; ++i) {
          q[h][v * Vec::kSize + i] = vec[i] * factor;
          acc[h][v * Vec::kSize + i] = 0.0f;
        }
      }
    }
  }

  // The warp's tile of keys from `start` on, of which those in [lowest, end) count.
  __device__ void attend(const int32_t* table, int start, int lowest, int end) {
    Vec keys[kSteps][kVectors], values[kSteps][kVectors];
    bool seen[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int key = start + i * kGroups + group;
      seen[i] = key >= lowest && key < end;
      const int block = block_of(key);
      const int64_t first = int64_t{seen[i] ? table[block] : 0} * args.block_size;
      const int64_t slot = first + (key - block * args.block_size);
      const int64_t offset = (slot * args.kv_heads + kv_head) * args.dim;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool there = seen[i] && column(v) < args.dim;
        keys[i][v].load(static_cast<const T*>(args.k_cache) + offset + column(v), there);
        values[i][v].load(static_cast<const T*>(args.v_cache) + offset + column(v), there);
      }
    }
    float scores[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float score = score_of(keys[i]);
      scores[i] = seen[i] ? score : minus_infinity();
    }
    weigh(scores);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) add(values[i], shared.weights[warp][i * kGroups + group]);
    __syncwarp();
  }

  // Score of the lane's head for the key of its group, in units of log 2.
  __device__ float score_of(const Vec (&key)[kVectors]) const {
    float products[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      products[h] = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        products[h] += q[h][c] * key[c / Vec::kSize][c % Vec::kSize];
    }
    const float score = sum_by_head<kHeads, kLanes>(products, lane);
    return args.softcap > 0 ? args.softcap * kLog2e * tanhf(score) : score;
  }

  // Turns scores into weights for all lanes to read, and scales what is there to the new maximum.
  __device__ void weigh(const float (&scores)[kSteps]) {
    float next = top;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) next = fmaxf(next, scores[i]);
#pragma unroll
    for (int offset = kLanes; offset < kWarp; offset *= 2)
      next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, offset));
    const float old = exp2f(top - guarded(next));
    sum *= old;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const float weight = exp2f(scores[i] - guarded(next));
      sum += weight;
      if (part % (kLanes / kHeads) == 0) shared.weights[warp][i * kGroups + group][head] = weight;
    }
    top = next;
    if (!__any_sync(kAllLanes, old != 1.0f)) return;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float factor = __shfl_sync(kAllLanes, old, h * (kLanes / kHeads));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) acc[h][c] *= factor;
    }
  }

  __device__ void add(const Vec (&value)[kVectors], const float (&weights)[kHeads]) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        acc[h][c] += weights[h] * value[c / Vec::kSize][c % Vec::kSize];
    }
  }

  // Leaves the warp's result in shared memory, summed over the keys' groups of lanes.
  __device__ void publish() {
#pragma unroll
    for (int offset = kLanes; offset < kWarp; offset *= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (group == 0 && part % (kLanes / kHeads) == 0) {
      shared.top[warp][head] = top;
      shared.sum[warp][head] = sum;
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float total = acc[h][c];
#pragma unroll
        for (int offset = kLanes; offset < kWarp; offset *= 2)
          total += __shfl_xor_sync(kAllLanes, total, offset);
        if (group == 0) shared.acc[warp][h][column(c / Vec::kSize) + c % Vec::kSize] = total;
      }
    }
    __syncthreads();
  }
};

}  // namespace eapo::cuda
