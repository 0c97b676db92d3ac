"""A recipe with single settings changed, under TRL's names."""

from __future__ import annotations

from typing import Any

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.recipes.recipe import Recipe

_LOSS_TYPES: dict[str, dict[str, Any]] = {
    "dapo": {"aggregation": "token-mean"},
    "bnpo": {"aggregation": "token-mean"},
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm"},
    "cispo": {"aggregation": "token-mean", "surrogate": "detached_clip", "epsilon": 1.0},
}
_SCALES = {"group": "std", "batch": "batch_std", "none": "none"}


def override(
    recipe: Recipe,
    *,
    loss_type: str | None = None,
    importance_sampling_level: str | None = None,
    scale_rewards: str | None = None,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float | None = None,
    entropy_coef: float | None = None,
    max_length: int | None = None,
) -> Recipe:
    """Return `recipe` with every setting that is not None put in its place.

    `loss_type` dapo, bnpo, grpo, dr_grpo sets the aggregation; cispo the surrogate as well, with no
    lower bound. `epsilon_high` is relative in every recipe (the bound is 1 + epsilon_high), also
    for cispo, where TRL means the bound itself. `max_length` fills the recipe's constant only where
    that is None. Raises `ConfigError` for a value or combination that cannot work.
    """
    changes: dict[str, Any] = {}
    if loss_type is not None:
        changes |= _pick("loss_type", loss_type, _LOSS_TYPES)
    if scale_rewards is not None:
        changes["scale"] = _pick("scale_rewards", scale_rewards, _SCALES)
    given = {
        "ratio": importance_sampling_level,
        "epsilon": epsilon,
        "epsilon_high": epsilon_high,
        "delta": delta,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "max_length": max_length if recipe.max_length is None else None,
    }
    return recipe.replace(**changes | {k: v for k, v in given.items() if v is not None})


def _pick(field: str, value: str, table: dict[str, Any]) -> Any:
    if value in table:
        return table[value]
    allowed = ", ".join(table)
    raise ConfigError(
        f"{field}: got {value!r}, allowed is one of {allowed}.{suggest(value, table)}"
    )
