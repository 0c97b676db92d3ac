"""What batch-global recipes need to know about a whole mini-batch before its tokens are evaluated.

`resolve` adds it to the rows; from then on every token can be evaluated by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.rows import Rows
from eapo_fast.kernels.policy_loss.selection import select
from eapo_fast.kernels.policy_loss.surrogate import surrogate
from eapo_fast.recipes import Recipe, Reweighting

_LEAST_P = 1e-8


def missing_statistics(recipe: Recipe, given: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the batch statistics that a, b and c still need."""
    wanted = ["selected"] if recipe.selection else []
    wanted += ["reweighting"] if recipe.reweighting else []
    wanted += ["entropy_share", "entropy_gap"] if recipe.entropy_target else []
    return tuple(name for name in wanted if name not in given)


def resolve(
    rows: Rows,
    recipe: Recipe,
    logprob: Tensor,
    entropy: Tensor | None = None,
    truncated: Tensor | None = None,
) -> tuple[Rows, dict[str, Tensor]]:
    """Return `rows` with the batch statistics of `recipe`, and what they were made from.

    l, H and Ht [n] are of the same rows: the whole batch, unless the recipe's scope is smaller.
    Statistics that the rows already have stay as they are. Raises `ValueError` for a part of a
    batch without them.
    """
    given = {**rows.stats, **rows.shared}
    missing = missing_statistics(recipe, given)
    if recipe.entropy_band is not None and "entropy_mean" not in given:
        missing = (*missing, "entropy_mean")
    if missing:
        rows = _whole(rows, recipe, missing)
    stats, shared = dict(rows.stats), dict(rows.shared)
    details: dict[str, Tensor] = {}
    if "selected" in missing and recipe.selection:
        details |= select(rows, recipe.selection, logprob, surrogate(rows, recipe, logprob))
        stats["selected"] = details["selected"]
    if "reweighting" in missing and recipe.reweighting:
        details["score"] = entropy_change(rows, logprob)
        stats["reweighting"] = token_weight(recipe.reweighting, details["score"], rows.live)
    if "entropy_mean" in missing and entropy is not None:
        shared["entropy_mean"] = _mean(rows, entropy)
    target = recipe.entropy_target
    if target and truncated is not None and {"entropy_share", "entropy_gap"} & set(missing):
        details["threshold"] = sequence_quantile(rows, truncated, target.quantile)
        details["selected"] = rows.counted(truncated > details["threshold"])
        share = _share(rows, details["selected"].to(truncated.dtype))
        level = (share * truncated).sum()
        stats["entropy_share"] = share
        shared["entropy_gap"] = level - rows.shared.get("anchor", level)
    return replace(rows, stats=stats, shared=shared), details


def entropy_change(rows: Rows, logprob: Tensor) -> Tensor:
    """Return Om [n] of STEER (arXiv 2510.10150): |A / p_old * p (1 - p) (ln p + H_old)|."""
    p = logprob.exp().clamp(_LEAST_P, 1 - _LEAST_P)
    old = rows.old_logprob.exp().clamp(min=_LEAST_P)
    entropy = rows.row_statistic("old_entropy")
    return (rows.advantages / old * p * (1 - p) * (p.log() + entropy)).abs()


def token_weight(reweighting: Reweighting, change: Tensor, live: Tensor | None = None) -> Tensor:
    """Return w(Om) [n] of STEER; where all Om are equal, "linear" gives the middle.

    `live`: the rows that count; None: all.
    """
    if not len(change):
        return change
    least, most = change.min(), change.max()
    if live is not None:
        least = torch.where(live, change, torch.inf).min()
        most = torch.where(live, change, 0.0).max()
    if reweighting.mapping == "exponential":
        rate = -math.log(reweighting.low) / most.clamp(min=reweighting.floor)
        return (-rate * change).exp().clamp(reweighting.low, 1.0)
    fall = (change - least) * (reweighting.high - reweighting.low) / (most - least)
    middle = (reweighting.high + reweighting.low) / 2
    weight = torch.where(most > least, reweighting.high - fall, middle)
    return weight.clamp(reweighting.low, reweighting.high)


def sequence_quantile(rows: Rows, values: Tensor, quantile: float) -> Tensor:
    """Return [n]: the quantile of `values` [n] over the row's sequence, linearly interpolated."""
    if not len(values):
        return values
    group = rows.sequence
    if rows.live is not None:
        group = torch.where(rows.live, group, len(rows.lengths))
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    ranked = values[order]
    place = quantile * (rows.lengths - 1).clamp(min=0).double()
    below = place.floor()
    starts = rows.lengths.cumsum(0) - rows.lengths
    low, high = (
        (starts + edge.long()).clamp(max=len(ranked) - 1) for edge in (below, place.ceil())
    )
    part = (place - below).to(values.dtype)
    return torch.lerp(ranked[low], ranked[high], part)[rows.sequence]


def _share(rows: Rows, kept: Tensor) -> Tensor:
    """Return dL_H/dHt [n] of SIREN (arXiv 2509.25133): 1 / (S kept_i) on the kept tokens."""
    return kept / rows.sequence_sum(kept).clamp(min=1) / rows.num_sequences


def _mean(rows: Rows, values: Tensor) -> Tensor:
    return rows.mean(values).to(values.dtype) if len(values) else values.new_zeros(())


def _whole(rows: Rows, recipe: Recipe, missing: tuple[str, ...]) -> Rows:
    """Return the rows of a whole batch. Raises `ValueError` if they are a part of one.

    Where that would mean to wait for a GPU, a part gets weights that are NaN, and so is its loss.
    """
    if recipe.scope != "batch":
        return rows
    if rows.live is not None or rows.num_tokens.device.type != "cpu":
        part = (rows.count > 0) & (rows.num_tokens != rows.count)
        return replace(rows, weight=torch.where(part, torch.nan, rows.weight))
    here, whole = len(rows.sequence), int(rows.num_tokens)
    if here and here != whole:
        raise ValueError(
            f"stats: recipe {recipe.name!r} needs {', '.join(missing)} of the whole batch, and "
            f"{here} of its {whole} tokens are here; take them from ops.policy_statistics over all "
            "tokens, or use recipe.replace(scope='micro_batch')"
        )
    return rows
