"""Rewards: is the answer right, is it well-formed, how long was it, how much help did it take.

`verify(prediction, gold)` decides an answer without ever evaluating text as code; the reward
functions around it have TRL's form and go into `Trainer(reward_funcs=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.rewards.extract import extract_answer, extract_gold
from eapo_fast.rewards.functions import Accuracy, Exact, accuracy, answer_of, exact, format
from eapo_fast.rewards.processes import in_process
from eapo_fast.rewards.shaping import consult_cost, consult_discount, overlong, paper_f1, token_f1
from eapo_fast.rewards.verdict import Verdict, readable, verify

__all__ = [
    "Accuracy",
    "Exact",
    "Verdict",
    "accuracy",
    "answer_of",
    "consult_cost",
    "consult_discount",
    "exact",
    "extract_answer",
    "extract_gold",
    "format",
    "get",
    "in_process",
    "names",
    "overlong",
    "paper_f1",
    "readable",
    "token_f1",
    "verify",
]

_READY = {"accuracy": accuracy, "exact": exact, "format": format, "paper_f1": paper_f1}
_GRADED: dict[str, Callable[..., Any]] = {"accuracy": Accuracy, "exact": Exact}
_FACTORIES: dict[str, Callable[..., Any]] = {
    "consult_cost": consult_cost,
    "consult_discount": consult_discount,
    "overlong": overlong,
}


def names() -> list[str]:
    """Return the names that `get` knows."""
    return sorted({**_READY, **_FACTORIES})


def get(name: str, **settings: Any) -> Any:
    """Return a reward function by name, as a configuration file gives it.

    Args:
        name: One of `names()`.
        settings: Arguments of `overlong`, `consult_cost`, `consult_discount`, `Accuracy` (for
            `accuracy`) or `Exact` (for `exact`).

    Raises:
        ConfigError: Unknown name, or settings for a function that takes none.
    """
    if name in _FACTORIES:
        return _FACTORIES[name](**settings)
    if name not in _READY:
        raise ConfigError(
            f"reward: got {name!r}, allowed is one of {', '.join(names())}.{suggest(name, names())}"
        )
    if settings and name in _GRADED:
        return _GRADED[name](**settings)
    if settings:
        raise ConfigError(f"reward {name!r} takes no settings, got {', '.join(settings)}")
    return _READY[name]
