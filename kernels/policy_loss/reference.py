"""Policy losses in plain torch: from log-probabilities to a loss and the coefficients a and b.

`token_terms` states every surrogate together with its derivative; nothing here is differentiated
by autograd. Notation as in `Recipe`: A, l, o, f, d = l - o, r, D = l - f, H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.rows import LossOutput, Rows
from eapo_fast.recipes import Recipe

_LOG_RATIO_LIMIT = 20.0
"""r = exp(clamp(d, -20, 20)) and so is k3's exponential; beyond it the gradient is 0."""
_SEQUENCE_LOG_RATIO_MAX = 10.0
"""s = exp(min(mean d, 10)), GSPO, arXiv 2507.18071."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Terms:
    """What `token_terms` finds, [n] each."""

    loss: Tensor
    """Loss of a token before aggregation."""
    a: Tensor
    """Derivative of the aggregated loss in l."""
    b: Tensor | None
    """Derivative of the aggregated loss in H; None: the recipe does not read H."""
    surrogate: Surrogate
    """The part without KL and entropy."""
    kl: Tensor | None
    """KL estimate; None without a reference."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Surrogate:
    """Loss L of a token and its slope, [n] each."""

    loss: Tensor
    """L."""
    slope: Tensor
    """dL/dx in x = log-ratio at the recipe's level (l itself for a detached ratio)."""
    ratio: Tensor
    """r or s."""
    low: Tensor
    """Whether the lower bound is active."""
    high: Tensor
    """Whether the upper bound is active."""
    dual: Tensor
    """Whether the dual clip is active."""


def policy_loss(rows: Rows, recipe: Recipe, logprob: Tensor, entropy: Tensor | None) -> LossOutput:
    """Return loss, metrics and coefficients for l [n], H [n] of `rows`; the loss is detached."""
    logprob = logprob.detach()
    entropy = None if entropy is None else entropy.detach()
    terms = token_terms(rows, recipe, logprob, entropy)
    b = torch.zeros_like(terms.a) if terms.b is None else terms.b
    return LossOutput(
        loss=(rows.weight * terms.loss).sum(),
        metrics=_metrics(rows, recipe, terms, logprob, entropy),
        a=rows.scatter(terms.a),
        b=rows.scatter(b),
        token_loss=rows.scatter(terms.loss),
    )


def token_terms(rows: Rows, recipe: Recipe, logprob: Tensor, entropy: Tensor | None) -> Terms:
    """Evaluate `recipe` on l [n] and H [n]. A token-local recipe looks at each row alone."""
    surrogate = _surrogate(rows, recipe, logprob)
    loss, slope = surrogate.loss, surrogate.slope
    if rows.factor is not None:
        loss, slope = loss * rows.factor, slope * rows.factor
    a = _to_tokens(rows, recipe, rows.weight * slope, surrogate)
    kl, kl_slope = _kl(rows, recipe, logprob)
    if recipe.beta > 0 and kl is not None and kl_slope is not None:
        loss = loss + recipe.beta * kl
        a = a + rows.weight * (recipe.beta * kl_slope)
    b = None
    if recipe.entropy_coef and entropy is not None:
        loss = loss - recipe.entropy_coef * entropy
        b = -recipe.entropy_coef * rows.weight
    return Terms(loss=loss, a=a, b=b, surrogate=surrogate, kl=kl)


def _surrogate(rows: Rows, recipe: Recipe, logprob: Tensor) -> Surrogate:
    drift = logprob - rows.old_logprob
    if recipe.surrogate == "geo_mean":
        return _geo_mean(rows, recipe, drift)
    ratio, open_ = _ratio(rows, recipe, drift)
    if recipe.surrogate == "clip":
        return _clip(rows, recipe, ratio, open_)
    never = torch.zeros_like(open_)
    scale = -rows.advantages
    if recipe.surrogate == "none":
        loss = scale * ratio
        slope = loss * open_
        return Surrogate(loss=loss, slope=slope, ratio=ratio, low=never, high=never, dual=never)
    low, high = never, never
    if recipe.surrogate == "detached_clip":
        least, most = 1 - recipe.epsilon, 1 + recipe.clip_high
        low, high = ratio < least, ratio > most
        scale = scale * ratio.clamp(least, most)
    loss = scale * logprob
    return Surrogate(loss=loss, slope=scale, ratio=ratio, low=low, high=high, dual=never)


def _ratio(rows: Rows, recipe: Recipe, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratio at the recipe's level and whether it still moves with the log-ratio."""
    most = _LOG_RATIO_LIMIT
    if recipe.ratio != "token":
        drift, most = rows.sequence_mean(drift), _SEQUENCE_LOG_RATIO_MAX
    inside = drift.clamp(-_LOG_RATIO_LIMIT, most)
    return inside.exp(), inside == drift


def _clip(rows: Rows, recipe: Recipe, ratio: Tensor, open_: Tensor) -> Surrogate:
    """PPO, arXiv 1707.06347, eq. 7; dual clip, arXiv 1912.09729, eq. 5."""
    advantages = rows.advantages
    least, most = 1 - recipe.epsilon, 1 + recipe.clip_high
    low = (advantages < 0) & (ratio < least)
    high = (advantages > 0) & (ratio > most)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(least, most))
    dual = torch.zeros_like(low)
    if recipe.delta is not None:
        dual = (advantages < 0) & (ratio > recipe.delta)
        loss = torch.where(dual, -advantages * recipe.delta, loss)
    moves = open_ & ~(low | high | dual)
    slope = torch.where(moves, -advantages * ratio, 0.0)
    return Surrogate(loss=loss, slope=slope, ratio=ratio, low=low, high=high, dual=dual)


def _geo_mean(rows: Rows, recipe: Recipe, drift: Tensor) -> Surrogate:
    """GMPO, arXiv 2507.20673: d is bounded on the side that A pushes to, then averaged."""
    advantages = rows.advantages
    low = (advantages < 0) & (drift < -recipe.epsilon)
    high = (advantages > 0) & (drift > recipe.clip_high)
    bounded = torch.where(low, -recipe.epsilon, torch.where(high, recipe.clip_high, drift))
    bounded = torch.where(advantages == 0, 0.0, bounded)
    mean = rows.sequence_mean(bounded)
    inside = mean.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio = inside.exp()
    loss = -advantages * ratio
    slope = loss * (inside == mean)
    dual = torch.zeros_like(low)
    return Surrogate(loss=loss, slope=slope, ratio=ratio, low=low, high=high, dual=dual)


def _to_tokens(rows: Rows, recipe: Recipe, direct: Tensor, surrogate: Surrogate) -> Tensor:
    """Pass derivatives in the log-ratio on to l: a mean over the sequence shares them out."""
    if recipe.surrogate == "geo_mean":
        moves = ~(surrogate.low | surrogate.high) & (rows.advantages != 0)
        return rows.sequence_mean(direct) * moves
    if recipe.ratio == "sequence" and recipe.surrogate != "detached_clip":
        return rows.sequence_mean(direct)
    return direct


def _kl(rows: Rows, recipe: Recipe, logprob: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the KL estimate of each token and its derivative in l."""
    if rows.ref_logprob is None:
        return None, None
    excess = logprob - rows.ref_logprob
    if recipe.kl == "k1":
        return excess, torch.ones_like(excess)
    if recipe.kl == "abs":
        return excess.abs(), excess.sign()
    if recipe.kl == "k2":
        return excess.square() / 2, excess
    inside = excess.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return torch.expm1(-inside) + inside, -torch.expm1(-inside) * (inside == excess)


def _metrics(
    rows: Rows, recipe: Recipe, terms: Terms, logprob: Tensor, entropy: Tensor | None
) -> dict[str, Tensor]:
    found = terms.surrogate
    gap = (logprob - rows.old_logprob).abs()

    def mean(values: Tensor) -> Tensor:
        return values.to(gap.dtype).sum() / rows.num_tokens

    metrics = {
        "clip_ratio/low_mean": mean(found.low),
        "clip_ratio/high_mean": mean(found.high),
        "clip_ratio/region_mean": mean(found.low | found.high),
        "ratio_mean": mean(found.ratio),
        "ratio_max": _largest(found.ratio),
        "logp_difference_mean": mean(gap),
        "logp_difference_max": _largest(gap),
    }
    if recipe.delta is not None:
        metrics["clip_ratio/delta_mean"] = mean(found.dual)
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    return metrics


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())
