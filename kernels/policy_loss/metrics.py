"""What is logged of a policy loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eapo_fast.kernels.policy_loss.rows import Rows
from eapo_fast.kernels.policy_loss.surrogate import Surrogate
from eapo_fast.recipes import Recipe


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Terms:
    """What `reference.token_terms` finds, [n] each."""

    loss: Tensor
    """Loss of a token before aggregation, without the entropy target."""
    a: Tensor
    """Derivative of the aggregated loss in l."""
    b: Tensor | None
    """Derivative of the aggregated loss in H; None: the recipe does not read H."""
    c: Tensor | None
    """Derivative of the aggregated loss in Ht; None: the recipe does not read Ht."""
    surrogate: Surrogate
    """The part without KL and entropy, before tokens are selected and weighted."""
    kl: Tensor | None
    """KL estimate; None without a reference."""
    penalty: Tensor | None
    """P of the entropy band; None without one."""


def metric_names(recipe: Recipe, reference: bool, entropy: bool) -> list[str]:
    """Return the names of the metrics, given whether the two optional inputs are there."""
    wanted = {
        "clip_ratio/low_mean": True,
        "clip_ratio/high_mean": True,
        "clip_ratio/region_mean": True,
        "ratio_mean": True,
        "ratio_max": True,
        "logp_difference_mean": True,
        "logp_difference_max": True,
        "clip_ratio/delta_mean": recipe.delta is not None,
        "kl": reference,
        "entropy": entropy,
        "selected_mean": recipe.selection is not None,
        "reweighting_mean": recipe.reweighting is not None,
        "entropy_penalty": recipe.entropy_band is not None,
        "truncated_entropy": recipe.entropy_target is not None,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def metrics_of(
    rows: Rows,
    recipe: Recipe,
    terms: Terms,
    logprob: Tensor,
    entropy: Tensor | None,
    truncated: Tensor | None,
) -> dict[str, Tensor]:
    """Return the metrics of resolved rows, by name."""
    found, gap = terms.surrogate, (logprob - rows.old_logprob).abs()
    averaged = {
        "clip_ratio/low_mean": found.low,
        "clip_ratio/high_mean": found.high,
        "clip_ratio/region_mean": found.low | found.high,
        "clip_ratio/delta_mean": found.dual,
        "ratio_mean": found.ratio,
        "logp_difference_mean": gap,
        "kl": terms.kl,
        "entropy": entropy,
        "selected_mean": rows.stats.get("selected"),
        "reweighting_mean": rows.stats.get("reweighting"),
        "entropy_penalty": terms.penalty,
    }
    largest = {"ratio_max": found.ratio, "logp_difference_max": gap}
    metrics = {name: _largest(rows.counted(values)) for name, values in largest.items()}
    if truncated is not None and "entropy_share" in rows.stats:
        metrics["truncated_entropy"] = (rows.stats["entropy_share"] * truncated).sum()
    names = metric_names(recipe, terms.kl is not None, entropy is not None)
    for name in names:
        values = averaged.get(name)
        if values is not None:
            metrics[name] = rows.counted(values).to(gap.dtype).sum() / rows.num_tokens
    return {name: metrics[name] for name in names}


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())
