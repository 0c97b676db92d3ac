// Weighted sums of values. Every output element is the sum over the keys in order.

// Vectors of units that a block of rows adds up at once in half of the registers.
template <typename T, int Rows>
constexpr int kValueVectors =
    std::clamp((kLanes == 16 ? 16 : 8) / (Rows * kPlanes<T>), 1, 4);

template <typename T, int Rows, int Vectors, bool Whole>
EAPO_INLINE void add_block(const T* const* values, int64_t d, int64_t left, int64_t keys,
                           const float* weights, int64_t stride, float* output, int64_t width,
                           Fetcher& fetcher) {
  F sums[Rows][Vectors][kPlanes<T>];
  const auto at = [&](int r, int v, int p) {
    return output + r * width + (v * kPlanes<T> + p) * kLanes;
  };
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      for (int p = 0; p < kPlanes<T>; ++p) sums[r][v][p] = load(at(r, v, p));
  for (int64_t key = 0; key < keys; ++key) {
    fetcher.step<Vectors>();
    for (int v = 0; v < Vectors; ++v) {
      const T* from = values[key] + d + v * kVectorElements<T>;
      const U units = Whole ? load_units(from) : load_first_units(from, left);
      for (int p = 0; p < kPlanes<T>; ++p)
        for (int r = 0; r < Rows; ++r)
          sums[r][v][p] = fused(splat(weights[r * stride + key]), plane<T>(units, p), sums[r][v][p]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      for (int p = 0; p < kPlanes<T>; ++p) store(at(r, v, p), sums[r][v][p]);
}

template <typename T, int Rows, int Vectors = kValueVectors<T, Rows>>
EAPO_INLINE void add_vectors(const T* const* values, int64_t offset, int64_t d, int64_t keys,
                             int64_t dim, const float* weights, int64_t stride, float* output,
                             int64_t width, Fetcher& fetcher) {
  constexpr int64_t step = Vectors * kVectorElements<T>;
  for (; d + step <= dim; d += step)
    add_block<T, Rows, Vectors, true>(values, offset + d, 0, keys, weights, stride, output + d,
                                      width, fetcher);
  if constexpr (Vectors > 1)
    add_vectors<T, Rows, Vectors / 2>(values, offset, d, keys, dim, weights, stride, output, width,
                                    fetcher);
  else if (d < dim)
    add_block<T, Rows, 1, false>(values, offset + d, dim - d, keys, weights, stride, output + d,
                                 width, fetcher);
}

// Adds to rows [row, end) of `output` [rows, width], which holds plane after plane of each vector.
template <typename T>
EAPO_INLINE void add_values(const T* const* values, int64_t offset, int64_t keys, int64_t row,
                            int64_t end, int64_t dim, const float* weights, int64_t stride,
                            float* output, int64_t width,
                           Fetcher& fetcher) {
  for_row_blocks(row, end, [&](int64_t first, auto rows) {
    add_vectors<T, rows()>(values, offset, 0, keys, dim, weights + first * stride, stride,
                           output + first * width, width, fetcher);
  });
}
