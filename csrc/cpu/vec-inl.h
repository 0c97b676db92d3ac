// Vector arithmetic of one target: F holds EAPO_LANES floats, I as many int32.

using F = float __attribute__((vector_size(EAPO_LANES * 4)));
using I = int32_t __attribute__((vector_size(EAPO_LANES * 4)));
using U = uint32_t __attribute__((vector_size(EAPO_LANES * 4)));
using H = uint16_t __attribute__((vector_size(EAPO_LANES * 2)));

constexpr int kLanes = EAPO_LANES;
constexpr float kInf = std::numeric_limits<float>::infinity();

// fn(constant 0) ... fn(constant Count - 1), unrolled whatever the optimiser thinks.
template <int Count, int First = 0, typename Fn>
EAPO_INLINE void unrolled(const Fn& fn) {
  if constexpr (First < Count) {
    fn(std::integral_constant<int, First>{});
    unrolled<Count, First + 1>(fn);
  }
}

EAPO_INLINE F broadcast(float x) { return F{} + x; }

EAPO_INLINE I iota() {
  I v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

EAPO_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// By hand where the compiler would widen in halves.
EAPO_INLINE U widened(H h) {
#if EAPO_LANES == 16
  return (U)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)h);
#elif EAPO_LANES == 8
  return (U)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}

EAPO_INLINE F load(const BFloat16* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  const U bits = widened(h) << 16;
  return (F)bits;
}

// The first n < kLanes elements; the rest are `fill`.
template <typename T>
EAPO_INLINE F load_first(const T* p, int64_t n, T fill) {
  T padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = i < n ? p[i] : fill;
  return load(padded);
}

EAPO_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// Rounded to nearest even, in the low half of each lane; NaN stays NaN.
EAPO_INLINE U bfloat16_bits(F v) {
  const U bits = (U)v;
  const U rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return v != v ? quiet : rounded;
}

EAPO_INLINE void store(BFloat16* p, F v) {
  const H h = __builtin_convertvector(bfloat16_bits(v), H);
  std::memcpy(p, &h, sizeof h);
}

// v as it would be read back after a store to T. A NaN that arithmetic on T gave stays one: its low
// bits are clear, so that rounding cannot carry out of it.
template <typename T>
EAPO_INLINE F rounded(F v) {
  if constexpr (std::is_same_v<T, float>) return v;
  const U bits = (U)v;
  return (F)((bits + ((bits >> 16) & 1u) + 0x7fffu) & 0xffff0000u);
}

template <typename T>
EAPO_INLINE void store_first(T* p, int64_t n, F v) {
  T padded[kLanes];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// Stores the lanes where `mask` is set one after another and returns their number; up to kLanes
// floats from p on are overwritten.
EAPO_INLINE int64_t store_selected(float* p, F v, I mask) {
#if EAPO_LANES == 16
  const __mmask16 bits = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(bits, (__m512)v));
  return __builtin_popcount(bits);
#else
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) {
    p[count] = v[i];
    count -= mask[i];
  }
  return count;
#endif
}

// Of a NaN and a number the number survives.
EAPO_INLINE F max(F a, F b) { return b > a ? b : a; }

// Lane i takes lane i ^ Distance.
template <int Distance>
EAPO_INLINE F swapped(F v) {
  const I lane = iota() ^ Distance;
  return EAPO_SHUFFLE(v, v, lane);
}

template <int Distance = kLanes / 2>
EAPO_INLINE float reduce_max(F v) {
  v = max(v, swapped<Distance>(v));
  if constexpr (Distance > 1) return reduce_max<Distance / 2>(v);
  return v[0];
}

template <int Distance = kLanes / 2>
EAPO_INLINE float reduce_sum(F v) {
  v += swapped<Distance>(v);
  if constexpr (Distance > 1) return reduce_sum<Distance / 2>(v);
  return v[0];
}

// exp(x) for x <= 0 within 1 ulp; exp(0) is exactly 1, below -87 it is 0, NaN stays NaN.
// Argument reduction by ln 2 and the minimax polynomial of the Cephes library.
EAPO_INLINE F exp_nonpositive(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const F square = r * r;
  F p = (r * 1.9875691500e-4f + 1.3981999507e-3f) * square +
        (r * 8.3334519073e-3f + 4.1665795894e-2f);
  p = p * square + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  p = p * square + r + 1.0f;
  const U power = ((U)shifted << 23) + (127u << 23);
  return x < -87.0f ? F{} : p * (F)power;
}

EAPO_INLINE float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }

EAPO_INLINE F tanh(F x) {
  const F magnitude = x < 0.0f ? -x : x;
  const F e = exp_nonpositive(magnitude * -2.0f);
  const F t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// One butterfly stage of the transpose: lanes with bit Distance change places between row pairs.
template <int Distance>
EAPO_INLINE void transpose_stage(F (&rows)[kLanes]) {
  const I lane = iota();
  const I high = (lane & Distance) != 0;
  const I low_index = high ? lane - Distance + kLanes : lane;
  const I high_index = high ? lane + kLanes : lane + Distance;
  unrolled<kLanes / 2>([&](auto pair) {
    constexpr int i = pair / Distance * 2 * Distance + pair % Distance;
    const F a = rows[i], b = rows[i + Distance];
    rows[i] = EAPO_SHUFFLE(a, b, low_index);
    rows[i + Distance] = EAPO_SHUFFLE(a, b, high_index);
  });
}

template <int Distance = kLanes / 2>
EAPO_INLINE void transpose(F (&rows)[kLanes]) {
  transpose_stage<Distance>(rows);
  if constexpr (Distance > 1) transpose<Distance / 2>(rows);
}
