// The token program for one register of tokens on a CPU (F, masks I), for one token on a GPU. Made
// from kernels/policy_loss/triton_program.py by `python -m eapo_fast.kernels.policy_loss.generate`;
// change that file, not this one.

// Return r = exp(clamp(drift, -20, limit)) and whether it moves with the drift.
EAPO_INLINE void ratio_terms(F drift, float limit, F& out0, I& out1) {
  F inside{};
  inside = bounded(drift, broadcast(-20.0f), broadcast(limit));
  out0 = exp_limited(inside);
  out1 = (inside == drift);
}

// Return L, its slope in the log-ratio, and whether the low, high and dual bound is active.
template <Surrogate SURROGATE>
EAPO_INLINE void surrogate_terms(F logprob, F ratio, I moves, F advantage, float least, float most,
    float delta, F& out0, F& out1, I& out2, I& out3, I& out4) {
  F push{}, lower{}, upper{}, clipped{}, loss{}, slope{};
  I low{}, high{}, dual{}, negative{}, above{};
  push = -advantage;
  low = (ratio < 0.0f);
  high = low;
  dual = low;
  if constexpr ((SURROGATE == Surrogate::kClip)) {
    negative = (advantage < 0.0f);
    lower = select(negative, broadcast(least), broadcast(-kInf));
    upper = select(negative, broadcast(delta), select((advantage > 0.0f), broadcast(most),
        broadcast(kInf)));
    above = (ratio > upper);
    low = (ratio < lower);
    high = (above & (advantage > 0.0f));
    dual = (above & negative);
    clipped = bounded(ratio, lower, upper);
    loss = (push * clipped);
    slope = select((moves & (clipped == ratio)), loss, broadcast(0.0f));
  } else {
    if constexpr ((SURROGATE == Surrogate::kDetachedClip)) {
      low = (ratio < least);
      high = (ratio > most);
      slope = (push * bounded(ratio, broadcast(least), broadcast(most)));
      loss = (slope * logprob);
    } else {
      if constexpr ((SURROGATE == Surrogate::kNone)) {
        loss = (push * ratio);
        slope = select(moves, loss, broadcast(0.0f));
      } else {
        loss = (push * logprob);
        slope = push;
      }
    }
  }
  out0 = loss;
  out1 = slope;
  out2 = low;
  out3 = high;
  out4 = dual;
}

// Return the KL estimate of D = `excess` and its slope in l.
EAPO_INLINE void kl_terms(F excess, KlEstimator KL, F& out0, F& out1) {
  F value{}, slope{}, inside{};
  I away{};
  if ((KL == KlEstimator::kK1)) {
    value = excess;
    slope = filled(excess, broadcast(1.0f));
  } else {
    if ((KL == KlEstimator::kAbs)) {
      value = absolute(excess);
      slope = select((excess > 0.0f), broadcast(1.0f), select((excess < 0.0f), broadcast(-1.0f),
          excess));
    } else {
      if ((KL == KlEstimator::kK2)) {
        value = ((excess * excess) * 0.5f);
        slope = excess;
      } else {
        inside = bounded(excess, broadcast(-20.0f), broadcast(20.0f));
        away = ((inside != excess) & (excess == excess));
        value = exp_excess(-inside);
        slope = select(away, broadcast(0.0f), -expm1(-inside));
      }
    }
  }
  out0 = value;
  out1 = slope;
}

// Return the loss of a token, its slopes in log-ratio and l, its KL, and the three bounds.
template <Surrogate SURROGATE>
EAPO_INLINE void token_terms(F logprob, F ratio, I moves, F advantage, F factor, F excess, F
    entropy, float least, float most, float delta, float beta, float entropy_coef, KlEstimator KL,
    bool FACTOR, bool REFERENCE, bool BETA, bool BONUS, F& out0, F& out1, F& out2, F& out3, I& out4,
    I& out5, I& out6) {
  F loss{}, slope{}, kl{}, direct{}, kl_slope{};
  I low{}, high{}, dual{};
  surrogate_terms<SURROGATE>(logprob, ratio, moves, advantage, least, most, delta, loss, slope, low,
      high, dual);
  if (FACTOR) {
    loss = (loss * factor);
    slope = (slope * factor);
  }
  kl = filled(ratio, broadcast(0.0f));
  direct = filled(ratio, broadcast(0.0f));
  if (REFERENCE) {
    kl_terms(excess, KL, kl, kl_slope);
    if (BETA) {
      loss = (loss + (beta * kl));
      direct = (beta * kl_slope);
    }
  }
  if (BONUS) {
    loss = (loss - (entropy_coef * entropy));
  }
  out0 = loss;
  out1 = slope;
  out2 = direct;
  out3 = kl;
  out4 = low;
  out5 = high;
  out6 = dual;
}
