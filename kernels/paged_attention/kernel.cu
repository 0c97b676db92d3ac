// Paged attention of single query rows: a block does one split of a row's keys (decode.cuh), and
// `merge` folds the splits.

#include "cuda/launch.cuh"
#include "paged_attention/decode.cuh"
#include "paged_attention/launch.h"

namespace eapo::cuda {
namespace {

// Largest score and sum of one head over the block's warps; the factor of warp w goes to scale[w].
template <typename Shared>
__device__ float2 join(const Shared& shared, int head, float (&scale)[kWarps]) {
  float top = minus_infinity(), sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.top[w][head]);
  for (int w = 0; w < kWarps; ++w) {
    scale[w] = exp2f(shared.top[w][head] - guarded(top));
    sum += shared.sum[w][head] * scale[w];
  }
  return make_float2(top, sum);
}

// What 1 / sum becomes with the head's sink in it, and the factor that sums of values need.
__device__ float final_factor(const PagedRowsArgs& args, int64_t head, float top, float sum) {
  float scale = 1.0f;
  if (args.sinks != nullptr) {
    const float sink = args.sinks[head] * kLog2e;
    const float base = guarded(fmaxf(top, sink));
    scale = exp2f(top - base);
    sum = sum * scale + exp2f(sink - base);
  }
  return sum == 0.0f ? 0.0f : scale / sum;
}

template <typename T, int kHeads, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) decode(const PagedRowsArgs args) {
  using Work = Decode<T, kHeads, kLanes, kVectors>;
  __shared__ typename Work::Shared shared;
  const int64_t group_heads = args.q_heads / args.kv_heads;
  const int64_t tiles = ceil_div(group_heads, kHeads);
  const int64_t tile = blockIdx.x % tiles, kv_head = blockIdx.x / tiles % args.kv_heads;
  const int64_t index = blockIdx.x / (tiles * args.kv_heads);
  const Row row = find_row(args, index);
  const int lowest = row.lowest(args.window), keys = row.position + 1;
  const int begin = (lowest / args.split + static_cast<int>(blockIdx.y)) * args.split;
  const bool direct = args.slots == 1;
  if (begin >= keys && !direct) return;

  Work work(args, shared, kv_head, tile);
  work.load_query(index);
  const int32_t* table = args.block_tables + row.segment * args.table_stride;
  const int end = min(keys, begin + args.split);
  for (int start = begin + work.warp * Work::kKeys; start < end; start += kWarps * Work::kKeys)
    if (start + Work::kKeys > lowest) work.attend(table, start, lowest, end);
  work.publish();

  for (int64_t i = threadIdx.x; i < work.heads * args.dim; i += kThreads) {
    const int64_t h = i / args.dim, d = i % args.dim;
    float scale[kWarps], acc = 0.0f;
    const float2 joined = join(shared, static_cast<int>(h), scale);
    for (int w = 0; w < kWarps; ++w) acc += shared.acc[w][h][d] * scale[w];
    const int64_t at = index * args.q_heads + work.first_head + h;
    if (direct) {
      const float factor = final_factor(args, work.first_head + h, joined.x, joined.y);
      static_cast<T*>(args.out)[at * args.dim + d] = from_float<T>(acc * factor);
    } else {
      const int64_t slot = at * args.slots + blockIdx.y;
      args.acc_parts[slot * args.dim + d] = acc;
      if (d == 0) {
        args.max_parts[slot] = joined.x;
        args.sum_parts[slot] = joined.y;
      }
    }
  }
}

// One warp a row and head: folds the splits in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge(const PagedRowsArgs args) {
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (at >= args.rows * args.q_heads) return;
  const Row row = find_row(args, at / args.q_heads);
  const int first = row.lowest(args.window) / args.split;
  const int splits = row.position < 0 ? 0 : row.position / args.split + 1 - first;
  const float* tops = args.max_parts + at * args.slots;
  float top = minus_infinity(), sum = 0.0f;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, tops[s]);
  for (int s = 0; s < splits; ++s)
    sum += args.sum_parts[at * args.slots + s] * exp2f(tops[s] - guarded(top));
  const float factor = final_factor(args, at % args.q_heads, top, sum);
  for (int64_t d = threadIdx.x % kWarp; d < args.dim; d += kWarp) {
    float acc = 0.0f;
    for (int s = 0; s < splits; ++s)
      acc += args.acc_parts[(at * args.slots + s) * args.dim + d] * exp2f(tops[s] - guarded(top));
    static_cast<T*>(args.out)[at * args.dim + d] = from_float<T>(acc * factor);
  }
}

template <typename T, int kHeads, int kLanes, int kVectors>
const char* run(const PagedRowsArgs& args, const Target& target) {
  const int64_t tiles = ceil_div(args.q_heads / args.kv_heads, kHeads);
  const dim3 grid(static_cast<unsigned>(args.rows * args.kv_heads * tiles),
                  static_cast<unsigned>(args.slots));
  const char* problem = launch(decode<T, kHeads, kLanes, kVectors>, grid, kThreads, target, args);
  if (problem != nullptr || args.slots == 1) return problem;
  const dim3 rows(static_cast<unsigned>(ceil_div(args.rows * args.q_heads, kWarps)));
  return launch(merge<T>, rows, kThreads, target, args);
}

template <typename T, int kHeads>
const char* run_heads(const PagedRowsArgs& args, const Target& target) {
  const int64_t lanes = args.dim * static_cast<int64_t>(sizeof(T)) / 16;
  if (lanes <= 8) return run<T, kHeads, 8, 1>(args, target);
  if (lanes <= 16) return run<T, kHeads, 16, 1>(args, target);
  if (lanes <= 32) return run<T, kHeads, 32, 1>(args, target);
  if constexpr (sizeof(T) == sizeof(float)) return run<T, kHeads, 32, 2>(args, target);
  return "dim is too large";
}

}  // namespace

const char* attend_rows(const PagedRowsArgs& args, const Target& target) {
  if (args.rows == 0) return nullptr;
  return with_type(args.storage, [&](auto type) {
    using T = decltype(type);
    const int64_t heads = args.q_heads / args.kv_heads;
    if (heads == 1) return run_heads<T, 1>(args, target);
    if (heads <= 4) return run_heads<T, 4>(args, target);
    return run_heads<T, 8>(args, target);
  });
}

}  // namespace eapo::cuda
