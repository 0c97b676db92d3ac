"""The acceptance gate: how much help step s still gets, and the keyed draw that decides it."""

from __future__ import annotations

import math
from typing import Literal, get_args

from eapo_fast._core import keyed_uniform
from eapo_fast.errors import ConfigError, suggest
from eapo_fast.experts.base import ConsultRequest

Schedule = Literal["inverse", "constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def acceptance(
    schedule: Schedule,
    step: int,
    *,
    offset: float = 1.0,
    power: float = 1.0,
    floor: float = 0.0,
    total_steps: int | None = None,
) -> float:
    """Probability in [floor, 1] that a consult of `step` is accepted (EAPO, arXiv 2509.23730).

    `inverse` is min(1, (step/offset)^-power), the paper's 1/s by default; `constant` is 1;
    `linear` and `cosine` stay at 1 up to `offset` and reach `floor` at `total_steps`. A step
    below 1 counts as 1. Raises ConfigError for an unknown schedule or a missing `total_steps`.
    """
    at = max(step, 1)
    if schedule == "inverse":
        return 1.0 if at <= offset else max(floor, math.pow(at / offset, -power))
    if schedule == "constant":
        return 1.0
    if schedule in ("linear", "cosine"):
        done = _progress(schedule, at, offset, total_steps)
        left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return floor + (1.0 - floor) * left
    raise ConfigError(
        f"schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}."
        f"{suggest(str(schedule), SCHEDULES)}"
    )


def _progress(schedule: str, step: int, offset: float, total_steps: int | None) -> float:
    if total_steps is None:
        raise ConfigError(f"schedule={schedule!r} needs total_steps: the step at which help ends.")
    span = max(float(total_steps) - offset, 1.0)
    return min(1.0, max(0.0, (step - offset) / span))


def gate_draw(seed: int, request: ConsultRequest) -> float:
    """The uniform draw in [0, 1) of this consult: a function of the seed and its place alone."""
    return keyed_uniform(seed, "gate", request.place)


def gate_accepts(rho: float, draw: float) -> bool:
    """`draw < rho`: with draws in [0, 1) rho = 1 always accepts and rho = 0 never does."""
    return draw < rho
