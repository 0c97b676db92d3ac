"""A consult that waits, and the piece of work that it waits for."""

from __future__ import annotations

from asyncio import TimerHandle
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eapo_fast.experts.base import Attempt, ConsultHandle, ConsultRequest
from eapo_fast.experts.budget import Amount, Reservation

if TYPE_CHECKING:
    from eapo_fast.experts.dispatch import Call


@dataclass(slots=True, eq=False)
class Consult:
    """One submission."""

    request: ConsultRequest
    """What was asked."""
    handle: ConsultHandle
    """What the caller holds."""
    submitted: float
    """Monotonic seconds."""
    deadline: float
    """Monotonic seconds; infinite for immediate experts."""
    accept: bool
    """The gate's decision."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed attempts, by kind, since this consult joined its flight."""
    claimed: bool = False
    """Its end is decided."""
    flight: Flight | None = None
    """The shared work."""
    key: str = ""
    """Canonical key of the request; empty if it never came so far."""
    merged: bool = False
    """It joined a flight that was under way."""
    timer: TimerHandle | None = None
    """Deadline timer; belongs to the loop thread."""


@dataclass(slots=True, eq=False)
class Flight:
    """One piece of work for the expert, waited for by one consult or by several equal ones."""

    key: str
    """Canonical key of the request."""
    request: ConsultRequest
    """The first consult's request."""
    opened: float = 0.0
    """Monotonic seconds of the first consult's submission."""
    waiters: list[Consult] = field(default_factory=list)
    """Consults that still wait; a flight without any is dead."""
    reservation: Reservation | None = None
    """Worst case of the current attempt."""
    extra: Reservation | None = None
    """Worst case of a call beside it."""
    held: Amount = field(default_factory=Amount)
    """Most that was reserved at once."""
    attempts: int = 0
    """Attempts begun."""
    began: float = 0.0
    """Monotonic seconds at which the current attempt began."""
    log: list[Attempt] = field(default_factory=list)
    """Attempts that ended."""
    nano: int = 0
    """Money charged by all attempts, nano-units."""
    expired: bool = False
    """It died of a deadline, not of a cancellation."""
    sent: bool = False
    """An attempt is in the expert's hands."""
    call: Call | None = None
    """The call that carries it; belongs to the loop thread."""
