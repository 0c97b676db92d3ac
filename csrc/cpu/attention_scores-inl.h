// Scores of a tile of keys. The keys are transposed so that lanes are keys; every score is the sum
// over the head dimension in order, whatever the rows and tiles it is computed with.

constexpr int64_t kKeyTile = 64;

#if EAPO_PAIR_DOTS
template <typename T>
constexpr bool kPairDots = kPlanes<T> == 2;
#else
template <typename T>
constexpr bool kPairDots = false;
#endif

// Planes of a query: a pair stays a pair where the target multiplies pairs.
template <typename T>
constexpr int kQueryPlanes = kPairDots<T> ? 1 : kPlanes<T>;

template <typename T>
struct Queries {
  float* data;     // [rows, kQueryPlanes, units]
  int64_t units;   // of a row, padded to whole vectors

  EAPO_INLINE float* row(int64_t index) const { return data + index * kQueryPlanes<T> * units; }
};

template <typename T>
EAPO_INLINE void load_query(const T* from, int64_t dim, const Queries<T>& queries, int64_t row) {
  float* to = queries.row(row);
  for (int64_t unit = 0; unit < queries.units; unit += kLanes) {
    const U units = row_units(from, unit * kPlanes<T>, dim);
    if constexpr (kQueryPlanes<T> == 1)
      store(to + unit, (F)units);
    else
      for (int p = 0; p < 2; ++p) store(to + p * queries.units + unit, plane<T>(units, p));
  }
}

// Writes [units, kKeyTile] units; `keys` rows rounded up to whole vectors must be readable.
template <typename T>
EAPO_INLINE void pack_keys(const T* const* rows, int64_t offset, int64_t keys, int64_t dim,
                           float* packed, Fetcher& fetcher) {
  for (int64_t d = 0, unit = 0; d < dim; d += kVectorElements<T>, unit += kLanes)
    for (int64_t key = 0; key < keys; key += kLanes) {
      F square[kLanes];
      fetcher.step<kLanes>();
      if (d + kVectorElements<T> <= dim)
        unrolled<kLanes>([&](auto i) { square[i] = (F)load_units(rows[key + i] + offset + d); });
      else
        unrolled<kLanes>(
            [&](auto i) { square[i] = (F)load_first_units(rows[key + i] + offset + d, dim - d); });
      transpose(square);
      unrolled<kLanes>([&](auto i) { store(packed + (unit + i) * kKeyTile + key, square[i]); });
    }
}

// sum + the query's unit at `factor` times plane p of a unit of kLanes keys (or both planes).
template <typename T>
EAPO_INLINE F add_product(const float* factor, U keys, int p, F sum) {
#if EAPO_PAIR_DOTS
  if constexpr (kPairDots<T>) {
    int32_t pair;
    std::memcpy(&pair, factor, sizeof pair);
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)keys);
  }
#endif
  return fused(splat(*factor), plane<T>(keys, p), sum);
}

template <typename T, int Rows, int Vectors>
EAPO_INLINE void score_block(const Queries<T>& queries, int64_t row, int64_t units,
                             const float* packed, float* scores, int64_t stride,
                             Fetcher& fetcher) {
  F sums[Rows][Vectors] = {};
  const float* query = queries.row(row);
  for (int64_t unit = 0; unit < units; ++unit) {
    fetcher.step<1>();
    for (int v = 0; v < Vectors; ++v) {
      const F keys = load(packed + unit * kKeyTile + v * kLanes);
      for (int p = 0; p < kQueryPlanes<T>; ++p)
        for (int r = 0; r < Rows; ++r) {
          const float* factor = query + (r * kQueryPlanes<T> + p) * queries.units + unit;
          sums[r][v] = add_product<T>(factor, (U)keys, p, sums[r][v]);
        }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(scores + r * stride + v * kLanes, sums[r][v]);
}

// Scores of rows [row, end) with the packed keys, at scores[row * stride + key].
template <typename T>
EAPO_INLINE void score_rows(const Queries<T>& queries, int64_t row, int64_t end, int64_t dim,
                            const float* packed, int64_t keys, float* scores, int64_t stride,
                            Fetcher& fetcher) {
  const int64_t units = (dim + kPlanes<T> - 1) / kPlanes<T>;
  for (int64_t key = 0; key < keys; key += 2 * kLanes)
    for_row_blocks(row, end, [&](int64_t first, auto rows) {
      float* to = scores + first * stride + key;
      if (key + kLanes < keys)
        score_block<T, rows(), 2>(queries, first, units, packed + key, to, stride, fetcher);
      else
        score_block<T, rows(), 1>(queries, first, units, packed + key, to, stride, fetcher);
    });
}
