// Sampling of one target. A row is never sorted: truncation turns into one threshold on the logits,
// found from a histogram over (max - x) / temperature and the members of one bucket.

constexpr int64_t kMassBlock = 256;  // entries whose probabilities are summed in fp32
constexpr int kBuckets = 1024;
constexpr float kBucketsPerNat = 32.0f;

// A row of logits with its temperature; entries below `threshold` have weight 0.
struct Row {
  const float* logits;
  int64_t size;
  float max;
  float inverse_temperature;
  float threshold = -kInf;

  // exp((x - max) / temperature), not normalised. NaN passes through.
  EAPO_INLINE F weight(F x) const {
    const F w = exp_nonpositive((x - max) * inverse_temperature);
    return x < threshold ? F{} : w;
  }
  EAPO_INLINE F at(int64_t begin, int64_t end) const {
    if (begin + kLanes <= end) return load(logits + begin);
    return load_first(logits + begin, end - begin, -kInf);
  }
};

EAPO_INLINE float row_max(const float* logits, int64_t size) {
  const Row row{.logits = logits, .size = size, .max = 0, .inverse_temperature = 1};
  F best = broadcast(-kInf);
  for (int64_t i = 0; i < size; i += kLanes) best = max(best, row.at(i, size));
  return reduce_max(best);
}

// Sums of weights by block of kMassBlock entries; returns the total.
EAPO_INLINE double block_masses(const Row& row, double* masses) {
  double total = 0;
  for (int64_t begin = 0; begin < row.size; begin += kMassBlock) {
    const int64_t end = std::min(begin + kMassBlock, row.size);
    F sum = {};
    for (int64_t i = begin; i < end; i += kLanes) sum += row.weight(row.at(i, end));
    total += masses[begin / kMassBlock] = reduce_sum(sum);
  }
  return total;
}

EAPO_INLINE I bucket(const Row& row, F x) {
  const F distance = (row.max - x) * (row.inverse_temperature * kBucketsPerNat);
  const F last = broadcast(kBuckets - 1);
  return __builtin_convertvector(distance < last ? distance : last, I);
}

// fn(logit, bucket, weight) for every entry.
template <typename Fn>
EAPO_INLINE void for_each(const Row& row, Fn&& fn) {
  for (int64_t i = 0; i < row.size; i += kLanes) {
    const F x = row.at(i, row.size);
    const F w = row.weight(x);
    const I b = bucket(row, x);
    const int64_t count = std::min<int64_t>(kLanes, row.size - i);
    for (int64_t lane = 0; lane < count; ++lane) fn(x[lane], b[lane], w[lane]);
  }
}

struct Histogram {
  int64_t count[kBuckets] = {};
  double mass[kBuckets] = {};
};

struct Entry {
  float logit;
  double weight;
};

// The members of one bucket that are not below the row's threshold, largest logit first.
inline void bucket_members(const Row& row, int wanted, std::vector<Entry>& members) {
  members.clear();
  for_each(row, [&](float x, int b, float w) {
    if (b == wanted && !(x < row.threshold)) members.push_back({x, w});
  });
  std::sort(members.begin(), members.end(),
            [](const Entry& a, const Entry& b) { return a.logit > b.logit; });
}

// The k-th largest logit. Sets `mass` to that of all entries at or above it.
inline float top_k_threshold(const Row& row, const Histogram& histogram, int64_t k, double& mass,
                             std::vector<Entry>& members) {
  mass = 0;
  int b = 0;
  for (; b < kBuckets - 1 && histogram.count[b] < k; ++b) {
    k -= histogram.count[b];
    mass += histogram.mass[b];
  }
  bucket_members(row, b, members);
  const float threshold = members[k - 1].logit;
  for (const Entry& entry : members)
    if (entry.logit >= threshold) mass += entry.weight;
  return threshold;
}

// The largest logit t such that the entries >= t hold at least `wanted` mass.
inline float top_p_threshold(const Row& row, const Histogram& histogram, double wanted,
                             std::vector<Entry>& members) {
  double mass = 0;
  int b = 0;
  for (; b < kBuckets - 1 && mass + histogram.mass[b] < wanted; ++b) mass += histogram.mass[b];
  bucket_members(row, b, members);
  for (const Entry& entry : members) {
    mass += entry.weight;
    if (mass >= wanted) return entry.logit;
  }
  return members.empty() ? row.threshold : members.back().logit;
}

// Raises row.threshold by top-k, then top-p of what is left, then min-p. Equals stay together.
inline void truncate(Row& row, int64_t top_k, float top_p, float min_p, double total) {
  const bool by_count = top_k > 0 && top_k < row.size, by_mass = top_p < 1.0f;
  if (by_count || by_mass) {
    Histogram histogram;
    for_each(row, [&](float, int b, float w) {
      ++histogram.count[b];
      histogram.mass[b] += w;
    });
    std::vector<Entry> members;
    if (by_count) row.threshold = top_k_threshold(row, histogram, top_k, total, members);
    if (by_mass)
      row.threshold = std::max(row.threshold,
                               top_p_threshold(row, histogram, top_p * total, members));
  }
  if (min_p > 0.0f) {
    const float cut = row.max + std::log(min_p) / row.inverse_temperature;
    row.threshold = std::min(row.max, std::max(row.threshold, cut));
  }
}

// The first entry whose cumulative mass exceeds u * total.
inline int64_t invert_cdf(const Row& row, const double* masses, double total, double u) {
  const double target = u * total;
  const int64_t blocks = (row.size + kMassBlock - 1) / kMassBlock;
  double cumulative = 0;
  int64_t chosen = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (masses[b] <= 0) continue;
    chosen = b;
    if (cumulative + masses[b] > target || b == blocks - 1) break;
    cumulative += masses[b];
  }
  const int64_t begin = chosen * kMassBlock, end = std::min(begin + kMassBlock, row.size);
  float weights[kMassBlock + kLanes];
  for (int64_t i = begin; i < end; i += kLanes)
    store(weights + i - begin, row.weight(row.at(i, end)));
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    if (weights[i - begin] <= 0) continue;
    last = i;
    cumulative += weights[i - begin];
    if (cumulative > target) break;
  }
  return last;
}

struct Draw {
  int64_t token;
  float logprob, kept;
};

constexpr Draw kBadDraw = {-1, std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::quiet_NaN()};

inline Draw draw_row(Row row, const SampleArgs& args, int64_t sample, double* masses) {
  const bool greedy = args.temperatures[sample] == 0.0f;
  row.inverse_temperature = greedy ? 1.0f : std::min(1.0f / args.temperatures[sample], 1e30f);
  const double full = block_masses(row, masses);
  if (!(std::isfinite(row.max) && std::isfinite(full))) return kBadDraw;
  if (greedy) {
    const int64_t token = std::find(row.logits, row.logits + row.size, row.max) - row.logits;
    return {token, static_cast<float>(-std::log(full)), 1.0f};
  }
  truncate(row, args.top_ks[sample], args.top_ps[sample], args.min_ps[sample], full);
  const bool truncated = row.threshold > -kInf;
  const double kept = truncated ? block_masses(row, masses) : full;
  const int64_t token = invert_cdf(row, masses, kept, args.uniforms[sample]);
  const double scaled = (row.logits[token] - row.max) * row.inverse_temperature;
  return {token, static_cast<float>(scaled - std::log(kept)), static_cast<float>(kept / full)};
}

template <typename T>
EAPO_INLINE void convert_row(const T* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  if (i < size) store_first(to + i, size - i, load_first(from + i, size - i, T{}));
}

// The sample's logits as fp32 with its bans applied; copied to `copy` only when either asks for it.
template <typename T>
EAPO_INLINE const float* prepared_logits(const SampleArgs& args, int64_t sample, float* copy) {
  const T* logits = static_cast<const T*>(args.logits) + args.sample_rows[sample] * args.row_stride;
  const int32_t ban_begin = args.ban_starts[sample], ban_end = args.ban_starts[sample + 1];
  if constexpr (std::is_same_v<T, float>)
    if (ban_begin == ban_end) return logits;
  convert_row(logits, args.vocab, copy);
  for (int32_t ban = ban_begin; ban < ban_end; ++ban) copy[args.ban_ids[ban]] = -kInf;
  return copy;
}

template <typename T>
void sample_range(const SampleArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.vocab + kMassBlock - 1) / kMassBlock;
  float* copy = workspace(args.vocab + 2 * blocks + 16);
  auto* masses = reinterpret_cast<double*>(copy + (args.vocab + 15) / 16 * 16);
  for (int64_t sample = begin; sample < end; ++sample) {
    const float* logits = prepared_logits<T>(args, sample, copy);
    const Row row{.logits = logits,
                  .size = args.vocab,
                  .max = row_max(logits, args.vocab),
                  .inverse_temperature = 1};
    const Draw draw = draw_row(row, args, sample, masses);
    args.out_tokens[sample] = draw.token;
    args.out_logprobs[sample] = draw.logprob;
    args.out_kept[sample] = draw.kept;
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
