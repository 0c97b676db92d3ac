// Blocks of bfloat16 logits that are only shifted and scaled, which nearly all are: one pass over
// the bits for the largest logit, one for exponentials and sums, and no copy in between.

// Whether every block of `row` may be read so, but for a logit that is not finite.
template <typename T>
EAPO_INLINE bool plain(const AbsorbArgs& args, int64_t row) {
  const LogitMap& map = args.map;
  return std::is_same_v<T, BFloat16> && map.bias == nullptr && map.softcap == 0 && !args.powers &&
         (map.ban_starts == nullptr || map.ban_starts[row] == map.ban_starts[row + 1]);
}

// 2^t for finite t <= 1, 2^0 is exactly 1. Relative error below 3e-6, which
// is a hundredth of what bfloat16 logits have in them.
EAPO_INLINE F power_of_two(F t) {
#if EAPO_LANES == 16
  constexpr int kFloor = 1;  // the fraction that is left lies in [0, 1)
  const F f = (F)_mm512_reduce_ps((__m512)t, kFloor);
  F p = broadcast(1.342668384e-2f);
  p = p * f + 5.224247277e-2f;
  p = p * f + 2.412801981e-1f;
  p = p * f + 6.930448413e-1f;
  p = p * f + 1.0f;
  return (F)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  return exp_nonpositive(t * 0.693147181f);
#endif
}

// Orders bfloat16 numbers as integers; its own inverse. A NaN comes before -inf or behind inf.
constexpr int16_t ordered(int16_t bits) { return bits ^ ((bits >> 15) & 0x7fff); }

// The least and the largest logit; both NaN unless all are finite.
struct Span {
  float least, most;
};

EAPO_INLINE Span span_of(const BFloat16* logits, int64_t count) {
  using Bits = int16_t __attribute__((vector_size(EAPO_LANES * 4)));
  constexpr int kBits = 2 * kLanes;
  constexpr auto kLowest = static_cast<int16_t>(0x8000), kHighest = static_cast<int16_t>(0x7fff);
  int16_t most = kLowest, least = kHighest;
  int64_t i = 0;
  if (count >= kBits) {
    Bits high = Bits{} + most, low = Bits{} + least;
    for (; i + kBits <= count; i += kBits) {
      Bits x;
      std::memcpy(&x, logits + i, sizeof x);
      x ^= (x >> 15) & kHighest;
      high = x > high ? x : high;
      low = x < low ? x : low;
    }
    for (int lane = 0; lane < kBits; ++lane) {
      most = std::max<int16_t>(most, high[lane]);
      least = std::min<int16_t>(least, low[lane]);
    }
  }
  for (; i < count; ++i) {
    const int16_t x = ordered(static_cast<int16_t>(logits[i].bits));
    most = std::max(most, x);
    least = std::min(least, x);
  }
  constexpr auto kInfinity = static_cast<int16_t>(0x7f80);
  const bool finite = most < kInfinity && least > ordered(static_cast<int16_t>(0xff80));
  const auto number = [&](int16_t x) {
    return finite ? as_float(BFloat16{static_cast<uint16_t>(ordered(x))})
                  : std::numeric_limits<float>::quiet_NaN();
  };
  return {number(least), number(most)};
}

constexpr double kLn2 = 0.69314718055994531;

// Exponentials of (logit - top) * rate, but for `excess`, and their sums; base 2. The distance from
// the top is one operation a vector; what its rounding adds to every one is taken off the sums.
struct PlainSums {
  float top, rate, offset;
  float excess;  // distance of the top itself, 0 or a little more: there the exponential is exact
  F mass = {}, moment = {};

  EAPO_INLINE PlainSums(float top, float rate) : top(top), rate(rate), offset(-(top * rate)) {
    excess = distance(broadcast(top))[0];
    if (excess >= 0) return;
    offset = std::nextafter(offset, kInf);
    excess = distance(broadcast(top))[0];
  }
  EAPO_INLINE F distance(F logit) const {
#if EAPO_LANES == 16
    return (F)_mm512_fmadd_ps((__m512)logit, (__m512)broadcast(rate), (__m512)broadcast(offset));
#elif EAPO_LANES == 8
    return (F)_mm256_fmadd_ps((__m256)logit, (__m256)broadcast(rate), (__m256)broadcast(offset));
#else
    return (logit - top) * rate;
#endif
  }
  EAPO_INLINE F add(F logit) {
    const F t = distance(logit);
    return add(t, power_of_two(t));
  }
  // Of the first `count` lanes.
  EAPO_INLINE F add_first(F logit, int64_t count) {
    const F t = distance(logit);
    return add(t, iota() < static_cast<int32_t>(count) ? power_of_two(t) : F{});
  }
  EAPO_INLINE F add(F t, F e) {
    mass += e;
    moment += e * t;
    return e;
  }
};

template <bool Store>
EAPO_INLINE PlainSums sum_plain(const BFloat16* logits, int64_t count, PlainSums sums,
                                BFloat16* out) {
  PlainSums even = sums, odd = sums;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    __builtin_prefetch(logits + i + kLossBlock);  // one block ahead
    const Pair x = load_pair(logits + i);
    const Pair e{even.add(x.first), odd.add(x.second)};
    if constexpr (Store) put(out + i, e);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, count - i);
    const F e = even.add_first(load_first(logits + i, left, logits[i]), left);
    if constexpr (Store) store_first(out + i, left, e);
  }
  even.mass += odd.mass;
  even.moment += odd.moment;
  return even;
}

// The block's sums in base e.
EAPO_INLINE void settle(BlockSums& sums, const PlainSums& plain) {
  const double mass = reduce_sum(plain.mass), moment = reduce_sum(plain.moment);
  const double scale = std::exp2(-static_cast<double>(plain.excess));
  sums.mass = scale * mass;
  sums.moment = kLn2 * scale * (moment - plain.excess * mass);
}

// The block of the target, whose own logit stands for the rounded one.
EAPO_INLINE void exchange(BlockSums& sums, const PlainSums& plain, float rounded, float own) {
  const double gone = static_cast<double>(plain.distance(broadcast(rounded))[0]) - plain.excess;
  const double come = (static_cast<double>(own) - plain.top) * plain.rate;
  const double lost = std::exp2(gone), won = std::exp2(come);
  sums.mass += won - lost;
  sums.moment += kLn2 * (won * come - lost * gone);
}

// Takes in the `count` logits of a block; `place` is the target's among them, or outside. Returns
// false, with nothing done, if one of them is not finite, or too far from the largest for float32.
EAPO_INLINE bool read_plain(const AbsorbArgs& args, int64_t row, const BFloat16* logits,
                            int64_t count, int64_t place, BFloat16* out, BlockSums& sums,
                            double& target) {
  const float shift = args.map.shift ? args.map.shift[row] : 0.0f;
  const float scale = 1.0f / args.map.temperature;
  const bool mine = place >= 0 && place < count, own = mine && args.map.own != nullptr;
  const float rounded = mine ? as_float(logits[place]) : 0.0f;
  const float exact = own ? args.map.own[row] - shift : rounded;
  const Span span = span_of(logits, count);
  const float top = own ? std::max(span.most, exact) : span.most;
  const PlainSums start(top, scale * 1.44269504f);
  const float farthest = start.distance(broadcast(std::min(span.least, exact)))[0];
  const float reference = (top + shift) * scale;
  constexpr float kMostOffset = 1 << 20;  // beyond, rounding it would move exponentials too far
  if (!(std::abs(start.offset) <= kMostOffset) || !std::isfinite(farthest) ||
      !std::isfinite(reference) || !std::isfinite(exact))
    return false;
  const PlainSums plain = out ? sum_plain<true>(logits, count, start, out)
                              : sum_plain<false>(logits, count, start, out);
  sums = {.reference = reference};
  settle(sums, plain);
  if (own) exchange(sums, start, rounded, exact);
  if (mine) target = (exact + shift) * scale;
  return true;
}
