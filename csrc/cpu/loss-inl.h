// Softmax statistics and logit gradients of one target. A block of columns is small enough to stay
// in the first-level cache between the pass that finds its maximum and the pass that sums it up.

EAPO_INLINE float as_float(float x) { return x; }
EAPO_INLINE float as_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

template <typename T>
constexpr T negative_infinity() {
  if constexpr (std::is_same_v<T, float>)
    return -kInf;
  else
    return T{0xff80};
}

// Stores what is not NaN (a NaN shows in the statistics of its row), halves away from zero.
EAPO_INLINE void put(float* p, F v) { store(p, v); }
EAPO_INLINE void put(BFloat16* p, F v) {
  const H h = __builtin_convertvector(((U)v + 0x8000u) >> 16, H);
  std::memcpy(p, &h, sizeof h);
}

// 2 kLanes neighbours, in an order that `put` knows.
struct Pair {
  F first, second;
};

template <typename T>
EAPO_INLINE Pair load_pair(const T* p) {
#if EAPO_BF16
  if constexpr (std::is_same_v<T, BFloat16>) {  // the even ones and the odd ones: fewer instructions
    U both;
    std::memcpy(&both, p, sizeof both);
    return {(F)(both << 16), (F)(both & 0xffff0000u)};
  }
#endif
  return {load(p), load(p + kLanes)};
}

template <typename T>
EAPO_INLINE void put(T* p, Pair v) {
#if EAPO_BF16
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Halves = uint16_t __attribute__((vector_size(4 * kLanes)));
    constexpr Halves kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
    const __m512i ordered = _mm512_permutexvar_epi16((__m512i)kOrder, halves);
    std::memcpy(p, &ordered, sizeof ordered);
    return;
  }
#endif
  put(p, v.first);
  put(p + kLanes, v.second);
}

// max(a, b) of vec-inl.h as one instruction.
EAPO_INLINE F larger(F a, F b) {
#if EAPO_LANES == 16
  return (F)_mm512_max_ps((__m512)b, (__m512)a);
#else
  return max(a, b);
#endif
}

// exp(x) for x in [-200, 0]; NaN stays NaN.
EAPO_INLINE F exp_of_distance(F x) {
#if EAPO_LANES == 16
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (x * 1.44269504f + kRound) - kRound;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exp_nonpositive(x);
#endif
}

// ln x of a normal positive x within 2 ulp; what it gives for 0 is finite or -inf, never NaN.
EAPO_INLINE F log_positive(F x) {
  const I bits = (I)x;
  F m = (F)((bits & 0x7fffff) | 0x3f000000);  // mantissa in [0.5, 1)
  const I small = m < 0.707106781f;
  const F e = __builtin_convertvector((bits >> 23) - 126 + small, F);
  m = m + (small ? m : F{}) - 1.0f;
  F p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const F square = m * m;
  return (p * m * square + e * -2.12194440e-4f - 0.5f * square) + m + e * 0.693359375f;
}

// Rows that one call of a parallel body takes on.
inline int64_t loss_grain(int64_t width) {
  return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width));
}

// y of a block, padded with -inf to whole vectors.
struct Block {
  alignas(64) float y[kLossBlock];
  int64_t count, padded;
};

EAPO_INLINE float largest(const Block& block) {
  F best = broadcast(-kInf);
  for (int64_t i = 0; i < block.padded; i += kLanes) best = max(best, load(block.y + i));
  return reduce_max(best);
}

// Returns the largest y.
template <typename T, typename Map>
EAPO_INLINE float map_block(const T* logits, Block& block, const Map& map) {
  F best = broadcast(-kInf);
  int64_t i = 0;
  for (; i + kLanes <= block.count; i += kLanes) {
    const F y = map(load(logits + i), i);
    store(block.y + i, y);
    best = larger(best, y);
  }
  if (i < block.count) {
    const F y = map(load_first(logits + i, block.count - i, negative_infinity<T>()), i);
    store(block.y + i, y);
    best = larger(best, y);
  }
  return reduce_max(best);
}

// Everything of LogitMap but the bans, for the columns of a block.
struct MapOfBlock {
  const float* bias;  // of the block's columns; null: 0
  int64_t count;
  float cap, inverse_cap, scale;

  EAPO_INLINE F bias_at(int64_t i) const {
    return i + kLanes <= count ? load(bias + i) : load_first(bias + i, count - i, 0.0f);
  }
  EAPO_INLINE F capped(F x) const {
    return x == -kInf ? x : tanh(x * inverse_cap) * (cap * scale);
  }
  // y of x, the sum of logit, shift and bias.
  EAPO_INLINE F operator()(F x) const { return cap > 0 ? capped(x) : x * scale; }
};

template <typename T>
EAPO_INLINE float map_logits(const T* logits, float shift, const MapOfBlock& map, Block& block) {
  if (map.cap > 0 && map.bias != nullptr)
    return map_block(logits, block,
                     [&](F x, int64_t i) { return map.capped(x + shift + map.bias_at(i)); });
  if (map.cap > 0)
    return map_block(logits, block, [&](F x, int64_t) { return map.capped(x + shift); });
  if (map.bias != nullptr)
    return map_block(logits, block,
                     [&](F x, int64_t i) { return (x + shift + map.bias_at(i)) * map.scale; });
  return map_block(logits, block, [&](F x, int64_t) { return (x + shift) * map.scale; });
}

// Fills `block` with y of the columns from `begin` on and returns the largest.
template <typename T>
EAPO_INLINE float read_block(const AbsorbArgs& args, int64_t row, int64_t begin, Block& block) {
  const LogitMap& map = args.map;
  const MapOfBlock mapped{.bias = map.bias ? map.bias + begin : nullptr,
                          .count = block.count,
                          .cap = map.softcap,
                          .inverse_cap = map.softcap > 0 ? 1.0f / map.softcap : 0.0f,
                          .scale = 1.0f / map.temperature};
  const T* logits = static_cast<const T*>(args.logits) + row * args.width + begin;
  float best = map_logits(logits, map.shift ? map.shift[row] : 0.0f, mapped, block);
  bool changed = false;
  const int64_t place = args.targets[row] - args.column - begin;
  if (map.own != nullptr && place >= 0 && place < block.count) {
    const float bias = mapped.bias ? mapped.bias[place] : 0.0f;
    block.y[place] = mapped(broadcast(map.own[row] + bias))[0];
    changed = true;
  }
  const int32_t bans = map.ban_starts ? map.ban_starts[row + 1] : 0;
  for (int32_t ban = map.ban_starts ? map.ban_starts[row] : 0; ban < bans; ++ban) {
    const int64_t banned = map.ban_ids[ban] - args.column - begin;
    if (banned < 0 || banned >= block.count) continue;
    block.y[banned] = -kInf;
    changed = true;
  }
  return changed ? largest(block) : best;
}

// Sums over a block with its largest y as reference.
struct BlockSums {
  float reference;
  double mass = 0, moment = 0, mass2 = 0, mass3 = 0;
};

// Adds up one vector after another and hands on its exponentials.
template <bool Powers>
struct Summation {
  float reference;
  F mass = {}, moment = {}, mass2 = {}, mass3 = {};

  EAPO_INLINE F add(F y) {
    const F distance = larger(y - reference, broadcast(-200.0f));  // whose exponential is 0
    const F e = exp_of_distance(distance);
    mass += e;
    moment += e * distance;
    if constexpr (Powers) {
      mass2 += e * e;
      mass3 += e * e * e;
    }
    return e;
  }
  EAPO_INLINE BlockSums sums() const {
    return {.reference = reference,
            .mass = reduce_sum(mass),
            .moment = reduce_sum(moment),
            .mass2 = Powers ? reduce_sum(mass2) : 0.0,
            .mass3 = Powers ? reduce_sum(mass3) : 0.0};
  }
};

template <bool Powers, bool Store, typename T>
EAPO_INLINE BlockSums sum_block(const Block& block, float reference, T* out) {
  Summation<Powers> total{.reference = reference};
  int64_t i = 0;
  for (; i + kLanes <= block.count; i += kLanes) {
    const F e = total.add(load(block.y + i));
    if constexpr (Store) put(out + i, e);
  }
  if (i < block.count) {
    const F e = total.add(load(block.y + i));
    if constexpr (Store) store_first(out + i, block.count - i, e);
  }
  return total.sums();
}

template <typename T>
EAPO_INLINE BlockSums sum_block(const Block& block, float reference, bool powers, T* out) {
  if (powers) return out ? sum_block<true, true>(block, reference, out)
                         : sum_block<true, false>(block, reference, out);
  return out ? sum_block<false, true>(block, reference, out)
             : sum_block<false, false>(block, reference, out);
}

// A block whose y are all -inf, or else hold a NaN.
template <typename T>
EAPO_INLINE BlockSums empty_block(const Block& block, T* out) {
  BlockSums sums{.reference = -kInf};
  for (int64_t i = 0; i < block.count; ++i)
    if (block.y[i] != block.y[i]) sums.mass = std::numeric_limits<double>::quiet_NaN();
  if (out != nullptr) std::memset(out, 0, static_cast<size_t>(block.count) * sizeof(T));
  return sums;
}
