"""Which recipes the trainer runs, and what it says about the others before step 1."""

from __future__ import annotations

import pytest

from eapo_fast import EAPOConfig, recipes
from eapo_fast.errors import ConfigError
from eapo_fast.training.recipe import resolve_recipe

_REFUSED = {
    "clip_cov": r"'clip_cov' compares tokens of the whole batch .*scope='micro_batch'",
    "kl_cov": r"'kl_cov' compares tokens of the whole batch",
    "epo": r"'epo' compares tokens of the whole batch",
    "lp_reg": r"'lp_reg' reads max_logprob, kept_mass of every token",
    "steer": r"'steer' reads old_entropy of every token",
    "siren": r"'siren' reads truncated_entropy of every token",
    "reinforce_pp": r"'reinforce_pp' has advantages of single tokens",
    "reinforce_pp_baseline": r"'reinforce_pp_baseline' has advantages of single tokens",
}


@pytest.mark.parametrize("name", [n for n in recipes.names() if n not in _REFUSED])
def test_runs(name):
    assert resolve_recipe(EAPOConfig(recipe=name)).name == name


@pytest.mark.parametrize("name", _REFUSED)
def test_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"^recipe: {_REFUSED[name]}"):
        resolve_recipe(EAPOConfig(recipe=name))


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "epo"])
def test_micro_batch_statistics_are_a_choice(name):
    recipe = recipes.get(name).replace(scope="micro_batch")
    args = EAPOConfig(recipe=recipe)
    assert resolve_recipe(args) == recipe.replace(max_length=args.max_completion_length)
