// Rows of fp32 or bfloat16 in 32-bit units: one float, or two bfloat16 whose first is the low half.
// A vector of units becomes one or two vectors of fp32 ("planes") without a shuffle.

template <typename T>
constexpr int kPlanes = sizeof(float) / sizeof(T);

template <typename T>
constexpr int64_t kVectorElements = kLanes * kPlanes<T>;

EAPO_INLINE F splat(float x) { return x - F{}; }

// a * b + sum; one rounding wherever the target has it, so that every caller gets the same bits.
EAPO_INLINE F fused(F a, F b, F sum) {
#if EAPO_LANES == 16
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif EAPO_LANES == 8
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return a * b + sum;
#endif
}

template <typename T>
EAPO_INLINE U load_units(const T* p) {
  U units;
  std::memcpy(&units, p, sizeof units);
  return units;
}

// The first `count` elements, fewer than a vector holds; the rest are 0.
template <typename T>
EAPO_INLINE U load_first_units(const T* p, int64_t count) {
#if EAPO_LANES == 16
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (kPlanes<T> == 1) return (U)_mm512_maskz_loadu_epi32(mask, p);
  return (U)_mm512_maskz_loadu_epi16(mask, p);
#else
  U units = {};
  std::memcpy(&units, p, static_cast<size_t>(count) * sizeof(T));
  return units;
#endif
}

// One vector of a row of `dim` elements, from element d on.
template <typename T>
EAPO_INLINE U row_units(const T* row, int64_t d, int64_t dim) {
  if (d + kVectorElements<T> <= dim) return load_units(row + d);
  return load_first_units(row + d, dim - d);
}

template <typename T>
EAPO_INLINE F plane(U units, int index) {
  if constexpr (kPlanes<T> == 1) return (F)units;
  return index == 0 ? (F)(units << 16) : (F)(units & 0xffff0000u);
}

template <typename T>
EAPO_INLINE U joined(const F* planes) {
  if constexpr (kPlanes<T> == 1) return (U)planes[0];
  return bfloat16_bits(planes[0]) | bfloat16_bits(planes[1]) << 16;
}

template <typename T>
EAPO_INLINE void store_row_units(T* row, int64_t d, int64_t dim, U units) {
  const int64_t count = std::min(dim - d, kVectorElements<T>);
  std::memcpy(row + d, &units, static_cast<size_t>(count) * sizeof(T));
}

// Rows of a work item are computed in blocks of 8 (4 on 16 registers), 4, 2 and 1.
constexpr int kRowBlock = kLanes == 16 ? 8 : 4;

template <int Block = kRowBlock, typename Fn>
EAPO_INLINE void for_row_blocks(int64_t row, int64_t end, Fn&& fn) {
  for (; row + Block <= end; row += Block) fn(row, std::integral_constant<int, Block>{});
  if constexpr (Block > 1) for_row_blocks<Block / 2>(row, end, fn);
}
