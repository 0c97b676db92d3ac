// Softmax of one chunk of keys, and the sum of chunks.

struct Range {
  int64_t begin, end;
};

// Largest score and sum of exp(score - largest) of a row; {-inf, 0}: no keys.
struct Mass {
  float max, sum;

  EAPO_INLINE bool empty() const { return max == -kInf && sum == 0.0f; }
};

// What is subtracted before exp: where every score is -inf, nothing.
EAPO_INLINE float finite_or_zero(float max) { return max == -kInf ? 0.0f : max; }

// Turns the scores of `seen` keys into weights and those of the other `filled` keys into 0.
// filled.begin is a multiple of kLanes. Not inlined: one body for all callers.
__attribute__((noinline)) inline Mass softmax_row(const AttentionArgs& args, float* scores,
                                                  Range filled, Range seen) {
  const I low = I{} + static_cast<int32_t>(seen.begin), high = I{} + static_cast<int32_t>(seen.end);
  const float scale = args.scale, softcap = args.softcap;
  F best = splat(-kInf);
  I key = iota() + static_cast<int32_t>(filled.begin);
  for (int64_t i = filled.begin; i < filled.end; i += kLanes, key += kLanes) {
    F score = load(scores + i) * scale;
    if (softcap > 0) score = tanh(score / softcap) * softcap;
    score = (key >= low) & (key < high) ? score : splat(-kInf);
    store(scores + i, score);
    best = max(best, score);
  }
  const float largest = reduce_max(best);
  const float shift = finite_or_zero(largest);
  F sum = {};
  for (int64_t i = filled.begin; i < filled.end; i += kLanes) {
    const F weight = exp_nonpositive(load(scores + i) - shift);
    sum += weight;
    store(scores + i, weight);
  }
  return {largest, reduce_sum(sum)};
}

// Weighted values of rows, each relative to exp(mass.max).
struct RowSums {
  Mass* mass;
  float* values;  // [rows, width]
};

// Adds a chunk of a row to its total. Not inlined, as above.
__attribute__((noinline)) inline void add_chunk(const RowSums& total, int64_t row, Mass mass,
                                                const float* values, int64_t width) {
  if (mass.empty()) return;
  Mass& so_far = total.mass[row];
  float* sums = total.values + row * width;
  if (so_far.empty()) {
    so_far = mass;
    std::copy_n(values, width, sums);
    return;
  }
  const float largest = std::max(so_far.max, mass.max), shift = finite_or_zero(largest);
  const float before = exp_nonpositive(so_far.max - shift);
  const float added = exp_nonpositive(mass.max - shift);
  so_far = {largest, so_far.sum * before + mass.sum * added};
  for (int64_t i = 0; i < width; i += kLanes)
    store(sums + i, fused(splat(added), load(values + i), load(sums + i) * before));
}
