"""Policy-optimization methods as data: `recipes.get("eapo")`, `recipes.names()`, `Recipe`."""

from __future__ import annotations

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.recipes.catalogue import RECIPES
from eapo_fast.recipes.recipe import Recipe

__all__ = ["Recipe", "get", "names"]

_BY_NAME: dict[str, Recipe] = {recipe.name: recipe for recipe in RECIPES}


def names() -> list[str]:
    """Return the names that `get` knows, sorted."""
    return sorted(_BY_NAME)


def get(name: str) -> Recipe:
    """Return the recipe of that name. Raises `ConfigError` for an unknown one."""
    try:
        return _BY_NAME[name]
    except KeyError:
        hint = suggest(name, _BY_NAME)
        raise ConfigError(
            f"recipe: got {name!r}, allowed is one of {', '.join(names())}.{hint}"
        ) from None
