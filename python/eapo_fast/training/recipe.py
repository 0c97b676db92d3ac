"""The recipe of a run: the named one, with the fields that the user set on top."""

from __future__ import annotations

from typing import Any

from eapo_fast import recipes
from eapo_fast.config import EAPOConfig
from eapo_fast.errors import ConfigError
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
        ConfigError: unknown name, a combination that the recipe cannot take, or a recipe that reads
            more than an update gathers.
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
    recipe = base.replace(**changes)
    check_trainable(recipe)
    return recipe


def check_trainable(recipe: Recipe) -> None:
    """Raise `ConfigError` for a recipe that needs more than the trainer hands to the loss.

    An update has log-probabilities, entropies and one advantage a rollout, micro-batch by
    micro-batch.
    """
    if recipe.stats:
        raise ConfigError(
            f"recipe: {recipe.name!r} reads {', '.join(recipe.stats)} of every token, which the "
            "trainer does not gather; ops.policy_loss takes them in stats"
        )
    if recipe.whiten or recipe.gamma != 1:
        raise ConfigError(
            f"recipe: {recipe.name!r} has advantages of single tokens (whiten, gamma), and the "
            "trainer has one a rollout; ops.token_advantages and ops.policy_loss take them"
        )
    whole = recipe.locality == "batch-global" or recipe.entropy_band is not None
    if whole and recipe.scope == "batch":
        raise ConfigError(
            f"recipe: {recipe.name!r} compares tokens of the whole batch before the first backward "
            "pass, which the trainer does not do; for statistics of each micro-batch, pass "
            f"recipe=recipes.get({recipe.name!r}).replace(scope='micro_batch')"
        )
