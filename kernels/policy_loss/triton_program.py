"""The token program: what a recipe makes of one token. Written here, once.

Triton kernels call these functions; csrc/cpu/token_program-inl.h is made from this file by
`python -m eapo_fast.kernels.policy_loss.generate` (which explains the subset of Python that it
understands), and a test makes it again. Notation as in `Recipe`; values may be blocks or scalars.
A NaN stays a NaN, so that the caller can take masked tokens out last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.policy_loss.triton_math import bounded, exp_excess, expm1, filled

CLIP = tl.constexpr(0)
DETACHED_CLIP = tl.constexpr(1)
NONE = tl.constexpr(2)
REINFORCE = tl.constexpr(3)
K1 = tl.constexpr(0)
ABS = tl.constexpr(1)
K2 = tl.constexpr(2)
K3 = tl.constexpr(3)


@triton.jit
def ratio_terms(drift, limit):  # type: ignore[no-untyped-def]
    """Return r = exp(clamp(drift, -20, limit)) and whether it moves with the drift."""
    inside = bounded(drift, -20.0, limit)
    return tl.exp(inside), inside == drift


@triton.jit  # type: ignore[untyped-decorator]
def surrogate_terms(  # type: ignore[no-untyped-def]
    logprob, ratio, moves, advantage, least, most, delta, SURROGATE: tl.constexpr
):
    """Return L, its slope in the log-ratio, and whether the low, high and dual bound is active."""
    push = -advantage
    low = ratio < 0.0
    high = low
    dual = low
    if SURROGATE == CLIP:
        negative = advantage < 0.0
        lower = tl.where(negative, least, -float("inf"))
        upper = tl.where(negative, delta, tl.where(advantage > 0.0, most, float("inf")))
        above = ratio > upper
        low = ratio < lower
        high = above & (advantage > 0.0)
        dual = above & negative
        clipped = bounded(ratio, lower, upper)
        loss = push * clipped
        slope = tl.where(moves & (clipped == ratio), loss, 0.0)
    elif SURROGATE == DETACHED_CLIP:
        low = ratio < least
        high = ratio > most
        slope = push * bounded(ratio, least, most)
        loss = slope * logprob
    elif SURROGATE == NONE:
        loss = push * ratio
        slope = tl.where(moves, loss, 0.0)
    else:
        loss = push * logprob
        slope = push
    return loss, slope, low, high, dual


@triton.jit  # type: ignore[untyped-decorator]
def kl_terms(excess, KL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the KL estimate of D = `excess` and its slope in l."""
    if KL == K1:
        value = excess
        slope = filled(excess, 1.0)
    elif KL == ABS:
        value = tl.abs(excess)
        slope = tl.where(excess > 0.0, 1.0, tl.where(excess < 0.0, -1.0, excess))
    elif KL == K2:
        value = excess * excess * 0.5
        slope = excess
    else:
        inside = bounded(excess, -20.0, 20.0)
        away = (inside != excess) & (excess == excess)
        value = exp_excess(-inside)
        slope = tl.where(away, 0.0, -expm1(-inside))
    return value, slope


@triton.jit  # type: ignore[untyped-decorator]
def token_terms(  # type: ignore[no-untyped-def]
    logprob,
    ratio,
    moves,
    advantage,
    factor,
    excess,
    entropy,
    least,
    most,
    delta,
    beta,
    entropy_coef,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    FACTOR: tl.constexpr,
    REFERENCE: tl.constexpr,
    BETA: tl.constexpr,
    BONUS: tl.constexpr,
):
    """Return the loss of a token, its slopes in log-ratio and l, its KL, and the three bounds."""
    loss, slope, low, high, dual = surrogate_terms(
        logprob, ratio, moves, advantage, least, most, delta, SURROGATE
    )
    if FACTOR:
        loss = loss * factor
        slope = slope * factor
    kl = filled(ratio, 0.0)
    direct = filled(ratio, 0.0)
    if REFERENCE:
        kl, kl_slope = kl_terms(excess, KL)
        if BETA:
            loss = loss + beta * kl
            direct = beta * kl_slope
    if BONUS:
        loss = loss - entropy_coef * entropy
    return loss, slope, direct, kl, low, high, dual
