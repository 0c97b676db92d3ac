// The sampler: one pass over the logits by a block a tile, then one block a sample, as in
// triton_kernel.py. A truncated row is read again for every step of the eight-way bisection over
// the bits of float32 that finds its smallest kept logit. Sums over tiles are double; every order
// of additions is fixed.

#include "cuda/launch.cuh"
#include "sample/launch.h"
#include "sample/row.cuh"

namespace eapo::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) tile_sums(const SampleRowsArgs args) {
  __shared__ unsigned banned[kTile / 32];
  const int sample = static_cast<int>(blockIdx.x), start = static_cast<int>(blockIdx.y) * kTile;
  const int64_t row = args.rows[sample];
  const bool there = row >= 0 && row < args.num_rows;
  Logits<T> logits(args, sample, there ? row : 0, banned);
  logits.open(start);
  float x[kEach], top = minus_infinity(), sum = 0.0f;
  int broken = there ? 0 : 1;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = logits.at(start, i * kThreads + static_cast<int>(threadIdx.x));
    if (!(x[i] < INFINITY)) broken = 1;
    top = fmaxf(top, x[i]);
  }
  broken = reduce(broken, Larger());
  top = reduce(top, Larger());
  const float scale = inverse_of(args.temperatures[sample]) * kLog2e;
  const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += exp2f((x[i] - base) * scale);
  sum = reduce(sum, Sum());
  if (threadIdx.x == 0) {
    const int64_t at = int64_t{sample} * args.tiles + blockIdx.y;
    args.tops[at] = broken ? INFINITY : top;
    args.sums[at] = sum;
  }
}

__device__ double total_of(const double* shares, int tiles) {
  double sum = 0.0;
  for (int t = 0; t < tiles; ++t) sum += shares[t];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) draw(const SampleRowsArgs args) {
  __shared__ unsigned banned[kTile / 32];
  __shared__ double shares[SampleRowsArgs::kMaxTiles];
  const int sample = static_cast<int>(blockIdx.x), tiles = args.tiles;
  const float* tops = args.tops + int64_t{sample} * tiles;
  float top = minus_infinity();
  for (int t = 0; t < tiles; ++t) top = fmaxf(top, tops[t]);
  if (top == INFINITY || top == minus_infinity()) {
    if (threadIdx.x == 0) {
      args.tokens[sample] = -1;
      args.logprobs[sample] = args.kept[sample] = NAN;
    }
    return;
  }
  const float temperature = args.temperatures[sample], inverse = inverse_of(temperature);
  Logits<T> logits(args, sample, args.rows[sample], banned);
  Draw<T> work{logits, top, inverse * kLog2e};
  for (int t = static_cast<int>(threadIdx.x); t < tiles; t += kThreads)
    shares[t] = args.sums[int64_t{sample} * tiles + t] * exp2f((tops[t] - top) * work.scale);
  __syncthreads();
  const double full = total_of(shares, tiles);

  const bool greedy = temperature == 0.0f;
  const int top_k = args.top_ks[sample];
  const float top_p = args.top_ps[sample], min_p = args.min_ps[sample];
  const bool by_count = !greedy && top_k > 0 && top_k < args.vocab;
  const bool by_mass = !greedy && top_p < 1.0f, by_ratio = !greedy && min_p > 0.0f;
  int least = key_of(minus_infinity());
  const int64_t high = int64_t{key_of(top)} + 1;
  if (by_count) least = work.last_key(least, high, static_cast<float>(top_k), false);
  if (by_mass) {
    work.weigh(least, shares);
    const double wanted = static_cast<double>(top_p) * total_of(shares, tiles);
    least = work.last_key(least, high, static_cast<float>(wanted), true);
  }
  if (by_ratio) {
    const int cut = key_of(fminf(top, top + logf(min_p) / inverse));
    least = least > cut ? least : cut;
  }
  if (by_count || by_mass || by_ratio) work.weigh(least, shares);

  const double kept = total_of(shares, tiles);
  const double target = static_cast<double>(args.uniforms[sample]) * kept;
  double before = 0.0, passed = 0.0;
  int tile = 0;
  for (int t = 0; t < tiles; ++t) {
    if (greedy ? tops[t] == top : shares[t] > 0.0) {
      tile = t;
      before = passed;
      if (greedy || passed + shares[t] > target) break;
    }
    passed += shares[t];
  }
  const int start = tile * kTile;
  const int token = greedy ? work.argmax(start) : work.pick(start, least, target - before);
  if (threadIdx.x == 0) {
    const double distance = logits.at(start, token - start) - top;
    args.tokens[sample] = token;
    args.logprobs[sample] = static_cast<float>(distance * inverse - log(kept));
    args.kept[sample] = static_cast<float>(kept / full);
  }
}

}  // namespace

const char* sample_rows(const SampleRowsArgs& args, const Target& target) {
  if (args.samples == 0) return nullptr;
  return with_type(args.storage, [&](auto type) {
    using T = decltype(type);
    const auto samples = static_cast<unsigned>(args.samples);
    const dim3 grid(samples, static_cast<unsigned>(args.tiles));
    const char* problem = launch(tile_sums<T>, grid, kThreads, target, args);
    return problem != nullptr ? problem : launch(draw<T>, dim3(samples), kThreads, target, args);
  });
}

}  // namespace eapo::cuda
