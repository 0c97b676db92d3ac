"""Who waits for what: consults, the flights that they share, money, cache and record.

Everything here is thread-safe. `changed` guards the flights; it is notified at each end.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from asyncio import TimerHandle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from eapo_fast.experts.base import (
    ACCEPTED,
    ConsultHandle,
    ConsultRequest,
    ConsultResult,
    ConsultStatus,
    Expert,
    ExpertReply,
    Usage,
)
from eapo_fast.experts.budget import Ledger, Reservation
from eapo_fast.experts.cache import open_cache, request_key
from eapo_fast.experts.calling import worst_case
from eapo_fast.experts.metrics import Counters
from eapo_fast.experts.policy import ConsultPolicy
from eapo_fast.experts.recording import Recorder
from eapo_fast.experts.sanitize import clean_text
from eapo_fast.experts.secret import redact

if TYPE_CHECKING:
    from eapo_fast.experts.dispatch import Call

logger = logging.getLogger("eapo_fast.experts")
MAX_DETAIL = 500
QUIET: frozenset[str] = frozenset({"ok", "cached", "declined", "budget", "cancelled"})
"""Statuses that need no line in the log."""


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
    failures: int = 0
    """Failed attempts since this consult joined its flight."""
    claimed: bool = False
    """Its end is decided."""
    flight: Flight | None = None
    """The shared work."""
    timer: TimerHandle | None = None
    """Deadline timer; belongs to the loop thread."""


@dataclass(slots=True, eq=False)
class Flight:
    """One piece of work for the expert, waited for by one consult or by several equal ones."""

    key: str
    """Canonical key of the request."""
    request: ConsultRequest
    """The first consult's request."""
    waiters: list[Consult] = field(default_factory=list)
    """Consults that still wait; a flight without any is dead."""
    reservation: Reservation | None = None
    """Worst case of the current attempt."""
    attempts: int = 0
    """Attempts begun."""
    cost: float = 0.0
    """Money charged by all attempts."""
    expired: bool = False
    """It died of a deadline, not of a cancellation."""
    sent: bool = False
    """An attempt is in the expert's hands."""
    call: Call | None = None
    """The call that carries it; belongs to the loop thread."""


class Board:
    """The shared books of one scheduler."""

    def __init__(self, expert: Expert, policy: ConsultPolicy, ledger: Ledger) -> None:
        self.expert = expert
        self.policy = policy
        self.ledger = ledger
        self.counters = Counters()
        self.changed = threading.Condition()
        self.completed = 0
        self.outstanding: set[Consult] = set()
        self._flights: dict[str, Flight] = {}
        self._identity = str(getattr(expert, "identity", type(expert).__qualname__))
        self._replays = bool(getattr(expert, "replays", False))
        self._merges = policy.dedup == "in_flight" and not self._replays
        self._immediate = bool(getattr(expert, "immediate", False))
        self._warned: set[str] = set()
        self._cache = None if self._replays else open_cache(policy.cache)
        self._recorder = None if policy.record is None else Recorder(policy.record)

    def enter(self, consult: Consult) -> Flight | None:
        """Answer from the cache, join a flight, or open one; returns a flight that is new."""
        key = request_key(self._identity, consult.request)
        cached = self._cache.get(key) if self._cache else None
        if cached is not None:
            self._end(consult, replace(cached, status="cached", usage=None))
            return None
        with self.changed:
            flight = self._flights.get(key) if self._merges else None
            if flight is not None:
                self._join(consult, flight)
                self.counters.add("merged")
                return None
            flight = Flight(key, consult.request)
            affordable = self.reserve(flight)
            if affordable:
                self._join(consult, flight)
                self._flights[key] = flight
        if affordable:
            return flight
        self._end(consult, ExpertReply.failed("budget"))
        return None

    def _join(self, consult: Consult, flight: Flight) -> None:
        consult.flight = flight
        flight.waiters.append(consult)
        self.outstanding.add(consult)

    def reserve(self, flight: Flight) -> bool:
        """Hold the worst case of the next attempt; False if a budget forbids it."""
        if self._replays:
            return True
        worst = worst_case(self.expert, flight.request, self.policy.max_reply_tokens)
        flight.reservation = self.ledger.reserve(flight.request, worst)
        return flight.reservation is not None

    def settle(self, flight: Flight, reply: ExpertReply | None) -> None:
        """Close the books of an attempt; None: it was sent and nothing came back."""
        flight.sent = False
        if flight.reservation is None:
            return
        if reply is not None and not reply.billed:
            self.ledger.release(flight.reservation)
        else:
            usage = reply.usage if reply else None
            amount = self.ledger.settle(flight.reservation, usage)
            flight.cost += amount.nano / 1e9
            self.counters.charged(usage.tokens if usage else 0, amount.nano / 1e9)
        flight.reservation = None

    def land(self, flight: Flight, reply: ExpertReply) -> None:
        """End every waiter of the flight; the first one carries its cost."""
        if reply.status == "ok" and self._cache:
            self._store(flight.key, reply)
        usage, cost = reply.usage, flight.cost
        for consult in self.thin(flight, lambda _: True):
            self._end(consult, reply, usage, cost)
            usage, cost = None, 0.0

    def drop(self, flight: Flight, reply: ExpertReply, hopeless: Callable[[Consult], bool]) -> None:
        """End the waiters that are `hopeless` with a failure; the others wait on."""
        for consult in self.thin(flight, hopeless):
            self._end(consult, reply)

    def thin(self, flight: Flight, goes: Callable[[Consult], bool]) -> list[Consult]:
        """Take waiters off a flight; one without waiters can no longer be joined."""
        with self.changed:
            gone = [consult for consult in flight.waiters if goes(consult)]
            flight.waiters = [consult for consult in flight.waiters if not goes(consult)]
            if not flight.waiters and self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
        return gone

    def quit(self, consult: Consult, status: ConsultStatus) -> Flight | None:
        """End one consult early; returns its flight if nobody waits for that any more."""
        flight = consult.flight
        if flight is None or consult.claimed:
            return None
        gone = self.thin(flight, lambda other: other is consult)
        if status == "timeout" and not flight.waiters:
            flight.expired = True
        for other in gone:
            self._end(other, ExpertReply.failed(status, f"ended at {status}"))
        return flight if gone and not flight.waiters else None

    def decline(self, consult: Consult) -> None:
        """End a consult that the gate refused before dispatch."""
        self.counters.add("saved_by_gate")
        self._end(consult, ExpertReply.failed("declined"))

    def overdue(self, now: float, grace: float) -> list[Consult]:
        """Consults whose deadline passed more than `grace` seconds ago."""
        with self.changed:
            return [one for one in self.outstanding if one.deadline + grace <= now]

    def _end(
        self, consult: Consult, reply: ExpertReply, usage: Usage | None = None, cost: float = 0.0
    ) -> None:
        with self.changed:
            if consult.claimed:
                return
            consult.claimed = True
        self._record(consult.request, reply)
        result = self._result(consult, reply, usage, cost)
        self.counters.ended(result)
        self._log(reply.status, result.detail)
        with self.changed:
            consult.handle._result = result
            self.outstanding.discard(consult)
            self.completed += 1
            self.changed.notify_all()

    def _result(
        self, consult: Consult, reply: ExpertReply, usage: Usage | None, cost: float
    ) -> ConsultResult:
        status, text, truncated = reply.status, "", False
        if status in ACCEPTED:
            text, cut = clean_text(reply.text, self.policy.max_reply_chars)
            truncated = cut or reply.truncated
            status = status if text else "malformed"
        if not consult.accept and status != "cancelled":
            status, text, truncated = "declined", "", False
        waited = consult.flight is not None and consult.deadline < float("inf")
        latency = time.monotonic() - consult.submitted if waited else 0.0
        detail = redact(reply.detail)[:MAX_DETAIL]
        return ConsultResult(status, text, usage, cost, latency, reply.model, truncated, detail)

    def _record(self, request: ConsultRequest, reply: ExpertReply) -> None:
        if self._recorder is None or reply.status in ("declined", "cancelled"):
            return
        try:
            self._recorder.write(request, reply)
        except (OSError, ValueError) as error:
            self._warn_once("record", f"a consult could not be recorded: {error}")

    def _store(self, key: str, reply: ExpertReply) -> None:
        try:
            if self._cache:
                self._cache.put(key, reply)
        except sqlite3.Error as error:
            self._warn_once("cache", f"a reply could not be cached: {error}")

    def _log(self, status: ConsultStatus, detail: str) -> None:
        bad_query = self._immediate and status in ("malformed", "refused")
        if status not in QUIET and not bad_query:
            self._warn_once(status, f"a consult ended as {status}: {detail}")

    def _warn_once(self, topic: str, message: str) -> None:
        level = logging.DEBUG if topic in self._warned else logging.WARNING
        self._warned.add(topic)
        logger.log(level, "%s", redact(message))

    def close(self) -> None:
        """Let go of the cache and the record."""
        if self._cache:
            self._cache.close()
        if self._recorder:
            self._recorder.close()
