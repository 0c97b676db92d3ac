"""The trainer resolves every recipe."""

from __future__ import annotations

import pytest

from eapo_fast import EAPOConfig, recipes
from eapo_fast.training.recipe import resolve_recipe


@pytest.mark.parametrize("name", recipes.names())
def test_resolves(name):
    assert resolve_recipe(EAPOConfig(recipe=name)).name == name


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "epo"])
def test_micro_batch_statistics_are_a_choice(name):
    recipe = recipes.get(name).replace(scope="micro_batch")
    args = EAPOConfig(recipe=recipe)
    assert resolve_recipe(args) == recipe.replace(max_length=args.max_completion_length)
