"""The recipe of a run: the named one, with the fields that the user set on top."""

from __future__ import annotations

from typing import Any

from eapo_fast import recipes
from eapo_fast.config import EAPOConfig
from eapo_fast.recipes import Recipe

_LOSS_TYPES: dict[str, dict[str, Any]] = {
    "dapo": {"aggregation": "token-mean"},
    "bnpo": {"aggregation": "token-mean"},
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm"},
    "cispo": {"aggregation": "token-mean", "surrogate": "detached_clip", "epsilon": 1.0},
}

_SCALES = {"group": "std", "batch": "batch_std", "none": "none"}


def resolve_recipe(args: EAPOConfig) -> Recipe:
    """Return the recipe with `args`' overrides.

    Raises:
        ConfigError: unknown name, or a combination that the recipe cannot take.
    """
    base = recipes.get(args.recipe) if isinstance(args.recipe, str) else args.recipe
    changes: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("epsilon", "epsilon_high", "delta", "beta", "entropy_coef")
        if getattr(args, name) is not None
    }
    if args.loss_type is not None:
        changes = _LOSS_TYPES[args.loss_type] | changes
    if args.importance_sampling_level is not None:
        changes["ratio"] = args.importance_sampling_level
    if args.scale_rewards is not None:
        changes["scale"] = _SCALES[str(args.scale_rewards)]
    if base.max_length is None:
        changes["max_length"] = args.max_completion_length
    return base.replace(**changes)
