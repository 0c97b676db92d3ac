// From a row's sums to its results: statistics, the token program, and what the gradient needs.
#pragma once

#include "linear_token_stats/args.h"
#include "linear_token_stats/program.cuh"
#include "linear_token_stats/row.cuh"

namespace eapo::cuda {

constexpr float kLn2 = 0.6931471805599453f;

// What is read of a row besides its logits, early, since it is far away.
struct Token {
  int64_t target;
  float share, old_logprob, advantage, factor, ref_logprob;
};

__device__ inline float at_or(const float* values, int64_t i, float missing) {
  return values == nullptr ? missing : values[i];
}

__device__ inline Token token_of(const RunRowsArgs& args, int64_t source) {
  return {args.targets[source],
          at_or(args.weights, source, 0.0f),
          at_or(args.old_logprob, source, 0.0f),
          at_or(args.advantages, source, 0.0f),
          at_or(args.factor, source, 1.0f),
          at_or(args.ref_logprob, source, 0.0f)};
}

// Statistics of a row and the coefficients of its gradient.
struct Found {
  float logprob, entropy, loss, a, b;
};

template <cpu::Surrogate kSurrogate>
__device__ void run_program(const RunRowsArgs& args, const Token& token, Found& found) {
  float ratio, slope, direct, kl;
  bool moves, low, high, dual;
  program::ratio_terms(found.logprob - token.old_logprob, 20.0f, ratio, moves);
  program::token_terms<kSurrogate>(
      found.logprob, ratio, moves, token.advantage, token.factor,
      found.logprob - token.ref_logprob, found.entropy, args.least, args.most, args.delta,
      args.beta, args.entropy_coef, args.kl, args.factor != nullptr, args.ref_logprob != nullptr,
      args.beta != 0.0f, args.entropy_coef != 0.0f, found.loss, slope, direct, kl, low, high, dual);
  found.a = token.share * (slope + direct);
  found.b = args.entropy_coef == 0.0f ? 0.0f : -args.entropy_coef * token.share;
}

__device__ inline Found evaluate(const RunRowsArgs& args, int64_t source, const Token& token,
                                 const Sums& sums, float scale) {
  const float log_mass = logf(sums.mass);
  const bool known = token.target >= 0 && token.target < args.vocab;
  Found found{known ? kLn2 * fmaf(sums.hit, scale, -sums.base) - log_mass : NAN,
              log_mass - kLn2 * (sums.moment / sums.mass), 0.0f, 0.0f, 0.0f};
  if (args.weights == nullptr) {
    found.a = at_or(args.gradient ? args.a : nullptr, source, 0.0f);
    found.b = at_or(args.gradient ? args.b : nullptr, source, 0.0f);
    return found;
  }
  switch (args.surrogate) {
    case cpu::Surrogate::kClip: run_program<cpu::Surrogate::kClip>(args, token, found); break;
    case cpu::Surrogate::kDetachedClip:
      run_program<cpu::Surrogate::kDetachedClip>(args, token, found);
      break;
    case cpu::Surrogate::kNone: run_program<cpu::Surrogate::kNone>(args, token, found); break;
    default: run_program<cpu::Surrogate::kReinforce>(args, token, found);
  }
  return found;
}

__device__ inline void publish(const RunRowsArgs& args, int64_t source, const Sums& sums,
                               const Found& found) {
  args.logprob[source] = found.logprob;
  args.entropy[source] = found.entropy;
  if (args.state != nullptr) {
    float* state = args.state + source * args.state_stride;
    state[0] = sums.top * args.inverse;
    state[1] = sums.mass;
    state[2] = kLn2 * sums.moment;
  }
  if (args.weights == nullptr) return;
  args.a[source] = found.a;
  if (args.b != nullptr) args.b[source] = found.b;
  args.losses[source] = found.loss;
}

// The gradient of a logit but for the one-hot term: 2^d (level + tilt d).
struct Bend {
  float scale, base, level, tilt;

  __device__ Bend(const RunRowsArgs& args, const Sums& sums, const Found& found, float scale)
      : scale(scale), base(sums.base) {
    const float each = -args.inverse / sums.mass;
    level = each * (found.a - found.b * kLn2 * (sums.moment / sums.mass));
    tilt = each * found.b * kLn2;
  }
  template <bool kTilted>
  __device__ float of(float x) const {
    const float d = fmaf(x, scale, -base);
    const float factor = kTilted ? fmaf(tilt, fmaxf(d, Sums::kFar), level) : level;
    return fast_exp2(d) * factor;
  }
};

}  // namespace eapo::cuda
