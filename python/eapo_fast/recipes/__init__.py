"""Policy-optimization methods as data: `recipes.get("eapo")`, `recipes.names()`, `Recipe`.

`Selection`, `Reweighting`, `EntropyBand` and `EntropyTarget` are optional parts of a recipe;
`phase_weight` is a schedule that one of them takes.
"""

from __future__ import annotations

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.recipes.catalogue import RECIPES
from eapo_fast.recipes.parts import EntropyBand, EntropyTarget, Reweighting, Selection
from eapo_fast.recipes.recipe import Recipe
from eapo_fast.recipes.schedules import phase_weight

__all__ = [
    "EntropyBand",
    "EntropyTarget",
    "Recipe",
    "Reweighting",
    "Selection",
    "get",
    "names",
    "phase_weight",
]

_BY_NAME: dict[str, Recipe] = {recipe.name: recipe for recipe in RECIPES}


def names() -> list[str]:
    """Return the names that `get` knows, sorted."""
    return sorted(_BY_NAME)


def get(name: str) -> Recipe:
    """Return the recipe of that name. Raises `ConfigError` for an unknown one."""
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    hint = suggest(str(name).lower(), _BY_NAME)
    raise ConfigError(f"recipe: got {name!r}, allowed is one of {', '.join(names())}.{hint}")
