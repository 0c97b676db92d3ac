// One sample's row of logits in the hands of a block: its bans, its smallest kept logit, its token.
#pragma once

#include "cuda/device.cuh"
#include "sample/args.h"

namespace eapo::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = SampleRowsArgs::kTile;
constexpr int kEach = kTile / kThreads;  // entries of a thread
constexpr int kCuts = 7;
constexpr int kNone = 0x7fffffff;

struct Larger {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Every thread of the block gets the same result.
template <typename T, typename Op>
__device__ T reduce(T x, Op op) {
  __shared__ T parts[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = op(x, __shfl_xor_sync(kAllLanes, x, offset));
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < kWarps; ++w) x = op(x, parts[w]);
  __syncthreads();
  return x;
}

// Sum over the threads before this one.
__device__ double sum_before(double x) {
  __shared__ double totals[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  double through = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double earlier = __shfl_up_sync(kAllLanes, through, offset);
    if (lane >= offset) through += earlier;
  }
  if (lane == kWarp - 1) totals[warp] = through;
  const double inside = __shfl_up_sync(kAllLanes, through, 1);
  __syncthreads();
  double before = lane == 0 ? 0.0 : inside;
  for (int w = 0; w < warp; ++w) before += totals[w];
  __syncthreads();
  return before;
}

// int32 in the order of the floats; one key for both zeros.
__device__ int key_of(float x) {
  const int bits = __float_as_int(x == 0.0f ? 0.0f : x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ float inverse_of(float temperature) {
  return temperature == 0.0f ? 1.0f : fminf(1.0f / temperature, 1e30f);
}

// The logits of one sample with its bans, a tile at a time.
template <typename T>
struct Logits {
  const SampleRowsArgs& args;
  int sample;
  const T* row;
  unsigned (&banned)[kTile / 32];  // of the tile that was opened last

  __device__ Logits(const SampleRowsArgs& args, int sample, int64_t index,
                    unsigned (&banned)[kTile / 32])
      : args(args),
        sample(sample),
        row(static_cast<const T*>(args.logits) + index * args.row_stride),
        banned(banned) {}

  // Notes the bans of the tile; all threads call it before they read.
  __device__ void open(int start) {
    if (args.bans == 0) return;
    __syncthreads();
    for (int i = threadIdx.x; i < kTile / 32; i += kThreads) banned[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < args.bans; i += kThreads) {
      const int entry = args.ban_ids[i] - start;
      if (args.ban_samples[i] == sample && entry >= 0 && entry < kTile)
        atomicOr(&banned[entry / 32], 1u << (entry % 32));
    }
    __syncthreads();
  }

  // -inf past the end and where banned.
  __device__ float at(int start, int entry) const {
    const bool there = start + entry < args.vocab;
    if (!there || (args.bans > 0 && (banned[entry / 32] >> (entry % 32) & 1u)))
      return minus_infinity();
    return to_float(row[start + entry]);
  }
};

// A sample's row with its largest logit and scale.
template <typename T>
struct Draw {
  Logits<T>& logits;
  float top, scale;

  __device__ float weight(float x) const { return exp2f((x - top) * scale); }

  // Largest key t in [low, high) such that the entries >= t weigh `wanted`, which `low` does; an
  // entry weighs 1, or with `by_mass` its share relative to the largest.
  __device__ int last_key(int64_t low, int64_t high, float wanted, bool by_mass) {
    while (high - low > 1) {
      const int64_t step = (high - low + kCuts) / (kCuts + 1);
      int cuts[kCuts];
      float sums[kCuts];
#pragma unroll
      for (int j = 0; j < kCuts; ++j) {
        const int64_t cut = low + (j + 1) * step;
        cuts[j] = static_cast<int>(cut < kNone ? cut : kNone);
        sums[j] = 0.0f;
      }
      for (int start = 0; start < logits.args.vocab; start += kTile) {
        logits.open(start);
#pragma unroll 4
        for (int i = 0; i < kEach; ++i) {
          const float x = logits.at(start, i * kThreads + static_cast<int>(threadIdx.x));
          const float share = by_mass ? weight(x) : 1.0f;
          const int key = key_of(x);
#pragma unroll
          for (int j = 0; j < kCuts; ++j)
            if (key >= cuts[j]) sums[j] += share;
        }
      }
      int64_t passed = 0;
#pragma unroll
      for (int j = 0; j < kCuts; ++j) {
        const bool reached = reduce(sums[j], Sum()) >= wanted;
        if (reached && low + (j + 1) * step < high) ++passed;
      }
      low += passed * step;
      high = high < low + step ? high : low + step;
    }
    return static_cast<int>(low);
  }

  // Weights of the tiles' entries with keys of at least `least`, into `shares`.
  __device__ void weigh(int least, double* shares) {
    for (int start = 0; start < logits.args.vocab; start += kTile) {
      logits.open(start);
      float sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < kEach; ++i) {
        const float x = logits.at(start, i * kThreads + static_cast<int>(threadIdx.x));
        if (key_of(x) >= least) sum += weight(x);
      }
      sum = reduce(sum, Sum());
      if (threadIdx.x == 0) shares[start / kTile] = sum;
    }
    __syncthreads();
  }

  // First entry of the tile whose cumulative weight exceeds the target; rounding never passes the
  // last entry with a weight.
  __device__ int pick(int start, int least, double target) {
    logits.open(start);
    const int first = static_cast<int>(threadIdx.x) * kEach;
    double sum = 0.0;
    for (int i = 0; i < kEach; ++i) sum += share(start, first + i, least);
    double before = sum_before(sum);
    int chosen = kNone, last = -1;
    for (int i = 0; i < kEach; ++i) {
      const double own = share(start, first + i, least);
      if (!(own > 0.0)) continue;
      before += own;
      last = start + first + i;
      if (before > target && chosen == kNone) chosen = last;
    }
    chosen = reduce(chosen, Smaller());
    last = reduce(last, Larger());
    return chosen < last ? chosen : last;
  }

  // Smallest entry of the tile that equals the largest logit.
  __device__ int argmax(int start) {
    logits.open(start);
    int chosen = kNone;
    for (int i = kEach - 1; i >= 0; --i) {
      const int entry = i * kThreads + static_cast<int>(threadIdx.x);
      if (logits.at(start, entry) == top) chosen = start + entry;
    }
    return reduce(chosen, Smaller());
  }

 private:
  __device__ double share(int start, int entry, int least) const {
    const float x = logits.at(start, entry);
    return key_of(x) >= least ? static_cast<double>(weight(x)) : 0.0;
  }
};

}  // namespace eapo::cuda
