// The policy loss of a stretch of tokens of one sequence, for one target.

// exp(x) = scale (1 + r + q) for |x| <= 80; where scale is 1, x = r. NaN stays NaN.
// Argument reduction and polynomial as in exp_nonpositive.
struct ExpParts {
  F scale, r, q;

  EAPO_INLINE F value() const { return scale * (1.0f + r + q); }
};

EAPO_INLINE ExpParts exp_parts(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: n is in the low bits of what it is added to
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const I exponent = ((I)shifted + 127) << 23;
  return {(F)exponent, r, p * (r * r)};
}

// x inside [least, most]; NaN stays NaN.
EAPO_INLINE F bounded(F x, F least, F most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

EAPO_INLINE F absolute(F x) { return (F)((I)x & 0x7fffffff); }

// What the token program calls, see kernels/policy_loss/triton_math.py.
EAPO_INLINE F select(I condition, F yes, F no) { return condition ? yes : no; }

EAPO_INLINE F filled(F, F value) { return value; }

EAPO_INLINE F exp_limited(F x) { return exp_parts(x).value(); }

// exp(x) - 1 and exp(x) - 1 - x for |x| <= 80.
EAPO_INLINE F expm1(F x) {
  const ExpParts e = exp_parts(x);
  return e.scale == 1.0f ? e.r + e.q : e.value() - 1.0f;
}

EAPO_INLINE F exp_excess(F x) {
  const ExpParts e = exp_parts(x);
  return e.scale == 1.0f ? e.q : e.value() - 1.0f - x;
}

#include "cpu/token_program-inl.h"

// Sums of one block in single precision, small enough to lose nothing that matters.
struct BlockTotals {
  F loss{}, ratio{}, gap{}, kl{}, entropy{}, largest_ratio{}, largest_gap{};
  I low{}, high{}, dual{};

  void add_to(PolicySums& sums) const {
    for (int i = 0; i < kLanes; ++i) {
      sums.loss += loss[i];
      sums.ratio += ratio[i];
      sums.gap += gap[i];
      sums.kl += kl[i];
      sums.entropy += entropy[i];
      sums.low += low[i];
      sums.high += high[i];
      sums.dual += dual[i];
      sums.largest_ratio = std::max<double>(sums.largest_ratio, largest_ratio[i]);
      sums.largest_gap = std::max<double>(sums.largest_gap, largest_gap[i]);
    }
  }
};

EAPO_INLINE void count(I& total, I flags) { total -= flags; }  // a set flag is -1

// x where `live` is -1, 0 where it is 0, whatever x is.
EAPO_INLINE F kept(F x, I live) { return (F)((I)x & live); }

// One register of tokens.
struct Tokens {
  F logprob = {}, old_logprob = {}, ref_logprob = {}, entropy = {}, factor = {};
  I live = {};
};

// Evaluates one register of tokens: dloss/dl per unit of weight in `slope`, the loss in `loss`.
template <Surrogate kSurrogate, bool kTerms>
EAPO_INLINE void evaluate(const PolicyArgs& args, F advantage, const Tokens& in,
                          BlockTotals& totals, F& loss, F& slope) {
  const F drift = in.logprob - in.old_logprob;
  F ratio, direct, kl;
  I moves, low, high, dual;
  ratio_terms(drift, 20.0f, ratio, moves);
  token_terms<kSurrogate>(in.logprob, ratio, moves, advantage, in.factor,
                          in.logprob - in.ref_logprob, in.entropy, args.least, args.most,
                          args.delta, args.beta, args.entropy_coef, args.kl,
                          kTerms && args.factor != nullptr, kTerms && args.ref_logprob != nullptr,
                          kTerms && args.beta != 0,
                          kTerms && args.entropy != nullptr && args.entropy_coef != 0, loss, slope,
                          direct, kl, low, high, dual);
  if constexpr (kTerms) {
    slope += direct;
    totals.kl += kept(kl, in.live);
    totals.entropy += kept(in.entropy, in.live);
  }
  if constexpr (kSurrogate == Surrogate::kClip || kSurrogate == Surrogate::kDetachedClip) {
    count(totals.low, in.live & low);
    count(totals.high, in.live & high);
    count(totals.dual, in.live & dual);
  }
  const F gap = kept(absolute(drift), in.live), live_ratio = kept(ratio, in.live);
  totals.ratio += live_ratio;
  totals.gap += gap;
  totals.largest_ratio = max(totals.largest_ratio, live_ratio);
  totals.largest_gap = max(totals.largest_gap, gap);
  loss = kept(loss, in.live);
  slope = kept(slope, in.live);
}

// The mask of whole registers, and of the first `n` tokens from `at` on.
template <bool kMasked>
EAPO_INLINE I live_tokens(const bool* mask, int64_t at) {
  if constexpr (!kMasked) return I{} == 0;
#if EAPO_LANES == 16
  const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + at));
  return (I)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), flags) != 0;
#elif EAPO_LANES == 8
  const __m128i flags = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + at));
  return (I)_mm256_cvtepu8_epi32(flags) != 0;
#else
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  Bytes flags;
  std::memcpy(&flags, mask + at, sizeof flags);
  return __builtin_convertvector(flags, I) != 0;
#endif
}

template <bool kMasked>
EAPO_INLINE I first_live_tokens(const bool* mask, int64_t at, int64_t n) {
  I live{};
  for (int64_t i = 0; i < n; ++i) live[i] = kMasked && !mask[at + i] ? 0 : -1;
  return live;
}

// Tokens [begin, end) of one sequence, whose tokens weigh `weight`. kMasked: there is a mask.
// kTerms: there may be more than the surrogate, or an advantage for each token.
template <Surrogate kSurrogate, bool kMasked, bool kTerms>
EAPO_INLINE void run_tokens(const PolicyArgs& args, int64_t begin, int64_t end, int64_t sequence,
                            float weight, BlockTotals& totals) {
  const bool each = kTerms && args.advantage_per_token;
  const F shared = broadcast(each ? 0.0f : args.advantages[sequence]);
  const auto step = [&](const auto& read, I live, const auto& write) {
    Tokens in{.logprob = read(args.logprob), .old_logprob = read(args.old_logprob), .live = live};
    if constexpr (kTerms) {
      in.ref_logprob = args.ref_logprob ? read(args.ref_logprob) : F{};
      in.entropy = args.entropy ? read(args.entropy) : F{};
      in.factor = args.factor ? read(args.factor) : F{};
    }
    F loss, slope;
    evaluate<kSurrogate, kTerms>(args, each ? read(args.advantages) : shared, in, totals, loss,
                                 slope);
    totals.loss += loss * weight;
    write(args.a, slope * weight);
    write(args.token_loss, loss);
    if (kTerms && args.b != nullptr)
      write(args.b, kept(broadcast(-args.entropy_coef * weight), live));
  };
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes)
    step([&](const float* values) { return load(values + at); },
         live_tokens<kMasked>(args.mask, at),
         [&](float* target, F values) { store(target + at, values); });
  if (at < end)
    step([&](const float* values) { return load_first(values + at, end - at, 0.0f); },
         first_live_tokens<kMasked>(args.mask, at, end - at),
         [&](float* target, F values) { store_first(target + at, end - at, values); });
}

template <Surrogate kSurrogate, bool kMasked, bool kTerms>
void run_block(const PolicyArgs& shared, const float* weights, int64_t begin, int64_t end,
               PolicySums& sums) {
  const PolicyArgs args = shared;  // out of reach of the stores below
  const int64_t* next = std::upper_bound(args.cu_seqlens, args.cu_seqlens + args.sequences, begin);
  BlockTotals totals;
  for (int64_t sequence = next - args.cu_seqlens - 1; begin < end; ++sequence) {
    const int64_t stop = std::min(end, args.cu_seqlens[sequence + 1]);
    run_tokens<kSurrogate, kMasked, kTerms>(args, begin, stop, sequence, weights[sequence], totals);
    begin = stop;
  }
  totals.add_to(sums);
}

template <Surrogate kSurrogate>
void block_of(const PolicyArgs& args, const float* weights, int64_t begin, int64_t end,
              PolicySums& sums) {
  const bool terms = args.ref_logprob != nullptr || args.entropy != nullptr ||
                     args.factor != nullptr || args.b != nullptr || args.advantage_per_token;
  if (terms)
    return args.mask ? run_block<kSurrogate, true, true>(args, weights, begin, end, sums)
                     : run_block<kSurrogate, false, true>(args, weights, begin, end, sums);
  return args.mask ? run_block<kSurrogate, true, false>(args, weights, begin, end, sums)
                   : run_block<kSurrogate, false, false>(args, weights, begin, end, sums);
}

inline void policy_block(const PolicyArgs& args, const float* weights, int64_t begin, int64_t end,
                         PolicySums& sums) {
  switch (args.surrogate) {
    case Surrogate::kClip:
      return block_of<Surrogate::kClip>(args, weights, begin, end, sums);
    case Surrogate::kDetachedClip:
      return block_of<Surrogate::kDetachedClip>(args, weights, begin, end, sums);
    case Surrogate::kNone:
      return block_of<Surrogate::kNone>(args, weights, begin, end, sums);
    case Surrogate::kReinforce:
      return block_of<Surrogate::kReinforce>(args, weights, begin, end, sums);
  }
}
