// Thresholds of top-k and top-p for one target. A row is never sorted: a bracket around the
// threshold is narrowed by measuring what lies above eight pivots at once, until a handful of
// entries is left.

// Looks for the largest t such that the entries >= t have a measure (their number or their mass) of
// at least `wanted`. The entries >= low reach it, those >= high do not.
struct Search {
  const Row& row;
  double wanted;
  float* list;  // the entries in [low, high); room for all entries, rounded up to whole blocks
  float low, high;
  double above = 0;   // measure of the entries >= high
  int64_t count = 0;  // entries of the list; -inf fills its last vector
};

constexpr int kPivots = 8;
constexpr int64_t kFewEntries = 32;  // are sorted
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Stores the entries of `block` in [low, high) at the end of the list.
EAPO_INLINE void append(Search& search, const float* block, int64_t size, float low, float high) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const F x = load(block + i);
    search.count += store_selected(search.list + search.count, x, (x >= low) & (x < high));
  }
}

EAPO_INLINE void pad(Search& search) {
  for (int64_t i = search.count; i % kLanes != 0; ++i) search.list[i] = -kInf;
}

// Fills the list from the row; -inf never enters it.
template <typename T>
EAPO_INLINE void collect(const Source<T>& source, Search& search) {
  const float low = std::max(search.low, kLowest);
  BlockReader<T> blocks(source);
  for (int64_t b = 0; b < block_count(source.size); ++b)
    if (search.row.maxima[b] >= low) append(search, blocks.at(b), kBlock, low, search.high);
  pad(search);
}

// Evenly spaced in the bracket; without a lower end, at distances from the maximum that quadruple.
EAPO_INLINE void place_pivots(const Search& search, float* pivots) {
  for (int p = 0; p < kPivots; ++p) {
    const float share = (p + 1.0f) / (kPivots + 1);
    if (search.low > -kInf)  // halves, for the distance may be beyond the largest float
      pivots[p] = search.low + (0.5f * search.high - 0.5f * search.low) * (2 * share);
    else
      pivots[p] = p == 0 ? kLowest : search.row.max - std::ldexp(0.25f, 2 * (kPivots - 1 - p));
  }
}

// above[p] = measure of the entries >= pivots[p].
template <typename Measure>
EAPO_INLINE void measure_above(const Search& search, const float* pivots, double* above,
                               const Measure& measure) {
  F totals[kPivots] = {};
  for (int64_t begin = 0; begin < search.count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, search.count);
    F sums[kPivots] = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const F x = load(search.list + i);
      const F m = measure(x);
      unrolled<kPivots>([&](auto p) { sums[p] += x >= pivots[p] ? m : F{}; });
    }
    unrolled<kPivots>([&](auto p) { totals[p] += sums[p]; });
  }
  unrolled<kPivots>([&](auto p) { above[p] = search.above + reduce_sum(totals[p]); });
}

// One round; false when the bracket holds no other float than `low`.
template <typename Measure>
EAPO_INLINE bool narrow(Search& search, const Measure& measure) {
  float pivots[kPivots];
  double above[kPivots];
  place_pivots(search, pivots);
  measure_above(search, pivots, above, measure);
  const float low = search.low, high = search.high;
  for (int p = 0; p < kPivots; ++p) {
    if (above[p] >= search.wanted) {
      search.low = std::max(search.low, pivots[p]);
    } else if (pivots[p] < search.high) {
      search.high = pivots[p];
      search.above = above[p];
    }
  }
  if (search.low == low && search.high == high) return false;
  const int64_t count = search.count;
  search.count = 0;
  append(search, search.list, count, search.low, search.high);
  pad(search);
  return true;
}

// The threshold among the entries that were collected.
template <typename Measure>
EAPO_INLINE float find_threshold(Search& search, const Measure& measure) {
  while (search.count > kFewEntries)
    if (!narrow(search, measure)) return search.low;
  float* list = search.list;
  std::sort(list, list + search.count, [](float a, float b) { return a > b; });
  for (int64_t i = 0; i < search.count; ++i) {
    search.above += measure(broadcast(list[i]))[0];
    if (search.above >= search.wanted) return list[i];
  }
  return search.low;
}

inline float past(float x) { return std::nextafter(x, kInf); }

// The k-th largest logit, -inf when fewer are finite.
template <typename T>
inline float top_k_threshold(const Source<T>& source, const Row& row, int64_t k, float* list) {
  Search search{.row = row,
                .wanted = static_cast<double>(k),
                .list = list,
                .low = -kInf,
                .high = past(row.max)};
  collect(source, search);
  return find_threshold(search, [](F) { return broadcast(1.0f); });
}

// The largest logit t such that the entries >= t hold the share p of `total`, the mass of those
// that are not below row.threshold.
template <typename T>
inline float top_p_threshold(const Source<T>& source, const Row& row, float p, double total,
                             float* list) {
  // All entries with less than this weight together hold less than half of what may be cut.
  const double negligible = 0.5 * (1.0 - p) * total / source.size;
  const double low = row.max + std::log(negligible) / row.inverse_temperature;
  Search search{.row = row,
                .wanted = p * total,
                .list = list,
                .low = std::max(static_cast<float>(low), row.threshold),
                .high = past(row.max)};
  collect(source, search);
  return find_threshold(search, [&](F x) { return row.kept_weight(x); });
}
