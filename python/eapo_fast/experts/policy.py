"""`ConsultPolicy`: everything about consulting that is not the expert and not the money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Literal, get_args

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.experts.base import STATUSES
from eapo_fast.experts.checks import checked_count, checked_number, is_number
from eapo_fast.experts.gate import SCHEDULES, Schedule, acceptance

Gate = Literal["before_dispatch", "after_reply"]
Dedup = Literal["off", "in_flight", "step", "run"]
Answers = Literal["keep", "redact", "decline"]
RETRIES: Mapping[str, int] = MappingProxyType({"rate": 8, "down": 3, "malformed": 1})
"""Further attempts by kind of failure: a full queue empties, a wrong body hardly changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsultPolicy:
    """How consults are admitted, sent, merged and bounded in time."""

    schedule: Schedule = "constant"
    """How acceptance falls with the step: inverse, constant, linear or cosine."""
    schedule_offset: float = 1.0
    """Last step with full acceptance (s0)."""
    schedule_power: float = 1.0
    """Exponent of the inverse schedule (p)."""
    floor: float = 0.0
    """Least acceptance."""
    total_steps: int | None = None
    """Step at which linear and cosine reach the floor."""
    gate: Gate = "before_dispatch"
    """Draw before the call (declined consults cost nothing) or after it (as the paper words it)."""
    timeout: float = 60.0
    """Seconds from submission after which a consult ends, whatever it waits for."""
    max_concurrency: int = 64
    """Most calls to the expert at once; fewer while it answers 429 (`experts.slots`)."""
    max_wait: float = 0.02
    """Seconds a request may wait for others to fill its batch."""
    dedup: Dedup = "in_flight"
    """Share a reply between equal requests: never, while one of them is in flight, for the rest of
    the step, or for the rest of the run. Sharing a sampled reply makes a prompt group's rollouts
    depend on each other; `sample_index` keeps deliberate repeats apart."""
    cache: str | PathLike[str] | None = None
    """None, "memory", or the path of an SQLite file: accepted replies are bought once."""
    record: str | PathLike[str] | None = None
    """JSON-lines file that gets every consult and the engine's ticks, for `Recorded`."""
    step_timeout: float | None = None
    """Seconds from a step's first consult after which all its consults end; None: no such end."""
    retries: int | Mapping[str, int] = field(default_factory=lambda: RETRIES)
    """Further attempts after failures that may pass, inside the deadline: of any kind together, or
    by status."""
    hedge_after: float | None = None
    """Seconds after which a late call gets a second one beside it; the first good reply counts.
    Both are reserved in the budget, and the one given up is charged in full. None: never."""
    hedge_share: float = 0.05
    """Most hedges per call sent."""
    answers: Answers = "keep"
    """What to do with a boxed answer in a reply: keep, redact the box, or decline the reply."""
    max_reply_tokens: int = 1024
    """Cap on a reply, for budgets and (at 8 characters a token) for its text."""
    breaker_failures: int = 8
    """Failures in a row after which the expert is left alone for a while."""
    breaker_period: float = 10.0
    """Seconds between single probes of an expert that is down."""

    def __post_init__(self) -> None:
        _member("schedule", self.schedule, SCHEDULES)
        _member("gate", self.gate, get_args(Gate))
        _member("dedup", self.dedup, get_args(Dedup))
        _member("answers", self.answers, get_args(Answers))
        self._check_retries()
        for name in ("step_timeout", "hedge_after"):
            value = getattr(self, name)
            above = is_number(value) and value > 0
            _require(value is None or above, name, value, "None or a number above 0")
        for name in ("schedule_offset", "schedule_power", "timeout", "breaker_period"):
            value = getattr(self, name)
            _require(is_number(value) and value > 0, name, value, "a number above 0")
        for name in ("max_concurrency", "max_reply_tokens", "breaker_failures"):
            checked_count(name, getattr(self, name))
        checked_number("max_wait", self.max_wait, 0)
        share, floor = self.hedge_share, self.floor
        _require(is_number(share) and 0 < share <= 1, "hedge_share", share, "above 0, at most 1")
        _require(is_number(floor) and 0 <= floor <= 1, "floor", floor, "a number from 0 to 1")
        if self.total_steps is not None:
            checked_count("total_steps", self.total_steps)
        self.acceptance(1)

    def _check_retries(self) -> None:
        mapping = isinstance(self.retries, Mapping)
        for name in self.retries if isinstance(self.retries, Mapping) else ():
            _member("retries", name, STATUSES)
        counts = self.retries.values() if isinstance(self.retries, Mapping) else [self.retries]
        _require(
            all(is_number(count) and count == int(count) and count >= 0 for count in counts),
            "retries",
            dict(self.retries) if mapping else self.retries,  # type: ignore[arg-type]
            "0 or more, or such numbers by status",
        )

    def gives_up(self, failures: Mapping[str, int]) -> bool:
        """Whether a consult with so many `failures` by status gets no further attempt."""
        if isinstance(self.retries, Mapping):
            return any(count > self.retries.get(kind, 0) for kind, count in failures.items())
        return sum(failures.values()) > self.retries

    def acceptance(self, step: int) -> float:
        """rho(step) under this policy's schedule."""
        return acceptance(
            self.schedule,
            step,
            offset=self.schedule_offset,
            power=self.schedule_power,
            floor=self.floor,
            total_steps=self.total_steps,
        )

    @property
    def max_reply_chars(self) -> int:
        """Characters of reply text kept; the rollout cuts to `max_reply_tokens` tokens."""
        return 8 * self.max_reply_tokens


def _require(holds: bool, name: str, got: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {got!r}; it must be {allowed}.")


def _member(name: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        hint = suggest(str(got), allowed)
        raise ConfigError(f"{name} is {got!r}; allowed are {', '.join(allowed)}.{hint}")
