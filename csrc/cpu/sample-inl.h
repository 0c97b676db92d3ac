// Sampling of one target. A row is read once for its maximum and its normaliser together; the block
// that the draw falls into is then read again. Truncation turns into one threshold on the logits.

#include "cpu/logits-inl.h"
#include "cpu/truncate-inl.h"

struct Draw {
  int64_t token;
  float logprob, kept;
};

constexpr Draw kBadDraw = {-1, std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::quiet_NaN()};

// Maximum and masses of the row in one pass: what was summed under a smaller maximum is scaled down
// when a larger one turns up. Returns the total, which is not finite for a row without
// distribution.
template <typename T>
EAPO_INLINE double first_pass(const Source<T>& source, Row& row) {
  BlockReader<T> blocks(source);
  const int64_t count = block_count(source.size);
  row.max = -kInf;
  double total = 0;
  for (int64_t b = 0; b < count; ++b) {
    const float* block = blocks.at(b);
    row.maxima[b] = block_max(block);
    if (row.maxima[b] > row.max) {
      const double fall = std::exp((double{row.max} - row.maxima[b]) * row.inverse_temperature);
      row.max = row.maxima[row.max_block = b];
      if (row.max == kInf) return kInf;
      for (int64_t i = 0; i < b; ++i) row.masses[i] *= fall;
      total *= fall;
    }
    total += row.masses[b] = block_mass(block, [&](F x) { return row.weight(x); });
  }
  return row.max == -kInf ? kInf : total;
}

// Masses under row.threshold; returns their total.
template <typename T>
EAPO_INLINE double truncated_masses(const Source<T>& source, const Row& row) {
  const auto weight = [&](F x) { return row.kept_weight(x); };
  BlockReader<T> blocks(source);
  double total = 0;
  for (int64_t b = 0; b < block_count(source.size); ++b) {
    row.masses[b] = row.maxima[b] < row.threshold ? 0 : block_mass(blocks.at(b), weight);
    total += row.masses[b];
  }
  return total;
}

// Raises row.threshold by top-k, then top-p of what is left, then min-p. Equals stay together.
// Returns the mass that is left of `total`.
template <typename T>
inline double truncate(const Source<T>& source, Row& row, const SampleArgs& args, int64_t sample,
                       double total, float* list) {
  const int64_t top_k = args.top_ks[sample];
  const float top_p = args.top_ps[sample], min_p = args.min_ps[sample];
  const bool by_count = top_k > 0 && top_k < source.size, by_mass = top_p < 1.0f;
  if (by_count) {
    row.threshold = top_k_threshold(source, row, top_k, list);
    if (by_mass) total = truncated_masses(source, row);
  }
  if (by_mass) row.threshold = top_p_threshold(source, row, top_p, total, list);
  if (min_p > 0.0f) {
    const float cut = row.max + std::log(min_p) / row.inverse_temperature;
    row.threshold = std::min(row.max, std::max(row.threshold, cut));
  }
  return row.threshold > -kInf ? truncated_masses(source, row) : total;
}

// The first entry whose cumulative mass exceeds u * total, and its logit. Where rounding leaves
// none the last entry with a mass.
template <typename T>
EAPO_INLINE std::pair<int64_t, float> invert_cdf(const Source<T>& source, const Row& row,
                                                 double total, double u) {
  const double target = u * total;
  double below = 0, reached = 0;  // mass before the chosen part, and up to where the search is
  int64_t chosen = row.max_block;
  for (int64_t b = 0; b < block_count(source.size); ++b) {
    if (row.masses[b] <= 0) continue;
    chosen = b;
    below = reached;
    reached += row.masses[b];
    if (reached > target) break;
  }
  BlockReader<T> reader(source);
  const float* block = reader.at(chosen);
  F weights = {};
  int64_t first = 0;
  reached = below;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const F candidates = row.kept_weight(load(block + i));
    const double mass = reduce_sum(candidates);
    if (mass <= 0) continue;
    first = i;
    weights = candidates;
    below = reached;
    reached += mass;
    if (reached > target) break;
  }
  int64_t last = first;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (weights[lane] <= 0) continue;
    last = first + lane;
    below += weights[lane];
    if (below > target) break;
  }
  return {chosen * kBlock + last, block[last]};
}

template <typename T>
EAPO_INLINE int64_t first_maximum(const Source<T>& source, const Row& row) {
  BlockReader<T> blocks(source);
  const float* block = blocks.at(row.max_block);
  int64_t i = 0;
  while (block[i] != row.max) ++i;
  return row.max_block * kBlock + i;
}

template <typename T>
inline Draw draw(const Source<T>& source, Row row, const SampleArgs& args, int64_t sample,
                 float* list) {
  const float temperature = args.temperatures[sample];
  row.inverse_temperature = temperature == 0 ? 1.0f : std::min(1.0f / temperature, 1e30f);
  const double full = first_pass(source, row);
  if (!std::isfinite(full)) return kBadDraw;
  if (temperature == 0)
    return {first_maximum(source, row), static_cast<float>(-std::log(full)), 1.0f};
  const double kept = truncate(source, row, args, sample, full, list);
  const auto [token, logit] = invert_cdf(source, row, kept, args.uniforms[sample]);
  const double scaled = (double{logit} - row.max) / temperature;
  return {token, static_cast<float>(scaled - std::log(kept)),
          static_cast<float>(std::min(kept / full, 1.0))};
}

template <typename T>
void sample_range(const SampleArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = block_count(args.vocab);
  float* list = workspace(blocks * kBlock + 3 * blocks + 1);
  auto* masses = reinterpret_cast<double*>(list + blocks * kBlock);
  const Row row{.masses = masses, .maxima = reinterpret_cast<float*>(masses + blocks)};
  for (int64_t sample = begin; sample < end; ++sample) {
    const Source<T> source{
        static_cast<const T*>(args.logits) + args.sample_rows[sample] * args.row_stride, args.vocab,
        args.ban_ids + args.ban_starts[sample], args.ban_ids + args.ban_starts[sample + 1]};
    const Draw drawn = draw(source, row, args, sample, list);
    args.out_tokens[sample] = drawn.token;
    args.out_logprobs[sample] = drawn.logprob;
    args.out_kept[sample] = drawn.kept;
  }
}

inline void sample(const SampleArgs& args) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(args.vocab, 1));
  parallel_for(args.samples, grain, [&](int64_t begin, int64_t end) {
    if (args.storage == Storage::kFloat32)
      sample_range<float>(args, begin, end);
    else
      sample_range<BFloat16>(args, begin, end);
  });
}
