"""The surrogate losses and the KL estimators, each with its derivative; nothing is differentiated.

Notation as in `Recipe`: A, l, o, f, d = l - o, r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.rows import Rows
from eapo_fast.recipes import Recipe

LOG_RATIO_LIMIT = 20.0
"""r = exp(clamp(d, -20, 20)) and so is k3's exponential; beyond it the gradient is 0."""
SEQUENCE_LOG_RATIO_MAX = 10.0
"""s = exp(min(mean d, 10)), GSPO, arXiv 2507.18071."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Surrogate:
    """Loss L of a token and its slope, [n] each."""

    loss: Tensor
    """L."""
    slope: Tensor
    """dL/dx in x = log-ratio at the recipe's level (l itself for a detached ratio)."""
    ratio: Tensor
    """r or s."""
    moves: Tensor
    """Whether the ratio still moves with the log-ratio."""
    low: Tensor
    """Whether the lower bound is active."""
    high: Tensor
    """Whether the upper bound is active."""
    dual: Tensor
    """Whether the dual clip is active."""


def surrogate(rows: Rows, recipe: Recipe, logprob: Tensor) -> Surrogate:
    """Evaluate the surrogate of `recipe` on l [n]."""
    drift = logprob - rows.old_logprob
    if recipe.surrogate == "geo_mean":
        return _geo_mean(rows, recipe, drift)
    ratio, moves = _ratio(rows, recipe, drift)
    if recipe.surrogate == "clip":
        return _clip(rows, recipe, ratio, moves)
    never = torch.zeros_like(moves)
    low, high = never, never
    scale = -rows.advantages
    if recipe.surrogate == "none":
        loss = scale * ratio
        slope = loss * moves
    else:
        if recipe.surrogate == "detached_clip":
            least, most = 1 - recipe.epsilon, 1 + recipe.clip_high
            low, high = ratio < least, ratio > most
            scale = scale * ratio.clamp(least, most)
        loss, slope = scale * logprob, scale
    return Surrogate(
        loss=loss, slope=slope, ratio=ratio, moves=moves, low=low, high=high, dual=never
    )


def to_tokens(rows: Rows, recipe: Recipe, direct: Tensor, found: Surrogate) -> Tensor:
    """Pass derivatives in the log-ratio on to l: a mean over the sequence shares them out."""
    if recipe.surrogate == "geo_mean":
        moves = ~(found.low | found.high) & (rows.advantages != 0)
        return rows.sequence_mean(direct) * moves
    if recipe.ratio == "sequence" and recipe.surrogate != "detached_clip":
        return rows.sequence_mean(direct)
    return direct


def kl_estimate(kind: str, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL estimate of each token and its derivative in l, D = `excess` [n]."""
    if kind == "k1":
        return excess, torch.ones_like(excess)
    if kind == "abs":
        return excess.abs(), excess.sign()
    if kind == "k2":
        return excess.square() / 2, excess
    inside = excess.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-inside) + inside, -torch.expm1(-inside) * (inside == excess)


def _ratio(rows: Rows, recipe: Recipe, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratio at the recipe's level and whether it still moves with the log-ratio."""
    most = LOG_RATIO_LIMIT
    if recipe.ratio != "token":
        drift, most = rows.sequence_mean(drift), SEQUENCE_LOG_RATIO_MAX
    inside = drift.clamp(-LOG_RATIO_LIMIT, most)
    return inside.exp(), inside == drift


def _clip(rows: Rows, recipe: Recipe, ratio: Tensor, moves: Tensor) -> Surrogate:
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
    open_ = moves & ~(low | high | dual)
    slope = torch.where(open_, -advantages * ratio, 0.0)
    return Surrogate(
        loss=loss, slope=slope, ratio=ratio, moves=moves, low=low, high=high, dual=dual
    )


def _geo_mean(rows: Rows, recipe: Recipe, drift: Tensor) -> Surrogate:
    """GMPO, arXiv 2507.20673: d is bounded on the side that A pushes to, then averaged."""
    advantages = rows.advantages
    low = (advantages < 0) & (drift < -recipe.epsilon)
    high = (advantages > 0) & (drift > recipe.clip_high)
    bounded = torch.where(low, -recipe.epsilon, torch.where(high, recipe.clip_high, drift))
    bounded = torch.where(advantages == 0, 0.0, bounded)
    mean = rows.sequence_mean(bounded)
    inside = mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, moves = inside.exp(), inside == mean
    loss = -advantages * ratio
    never = torch.zeros_like(low)
    return Surrogate(
        loss=loss, slope=loss * moves, ratio=ratio, moves=moves, low=low, high=high, dual=never
    )
