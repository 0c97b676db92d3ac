"""Who waits for what: consults, the flights that they share, money, cache and record.

Everything here is thread-safe. `changed` guards the flights; it is notified at each end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

from eapo_fast.experts.base import (
    ACCEPTED,
    ConsultRequest,
    ConsultResult,
    ConsultStatus,
    Expert,
    ExpertReply,
    Usage,
)
from eapo_fast.experts.budget import NANO, Ledger, Reservation
from eapo_fast.experts.cache import Shelf, request_key
from eapo_fast.experts.calling import worst_case
from eapo_fast.experts.flights import Consult, Flight
from eapo_fast.experts.kept import KeptReplies
from eapo_fast.experts.metrics import Counters
from eapo_fast.experts.policy import ConsultPolicy
from eapo_fast.experts.recording import Recorder
from eapo_fast.experts.replies import shape
from eapo_fast.experts.results import attempt_of, brief, result_of
from eapo_fast.experts.secret import redact

logger = logging.getLogger("eapo_fast.experts")
QUIET: frozenset[str] = frozenset({"ok", "cached", "declined", "budget", "cancelled"})
"""Statuses that need no line in the log."""


class Board:
    """The shared books of one scheduler."""

    def __init__(self, expert: Expert, policy: ConsultPolicy, ledger: Ledger) -> None:
        self.expert = expert
        self.policy = policy
        self.ledger = ledger
        self.counters = Counters()
        self.changed = threading.Condition()
        self.completed = 0
        self.outstanding: dict[Consult, None] = {}  # in the order of submission, hence of deadline
        self._flights: dict[str, Flight] = {}
        self._identity = str(getattr(expert, "identity", type(expert).__qualname__))
        self._replays = bool(getattr(expert, "replays", False))
        self._merges = policy.dedup != "off" and not self._replays
        self._immediate = bool(getattr(expert, "immediate", False))
        self._warned: set[str] = set()
        self._landed = 0
        self._shelf = Shelf(None if self._replays else policy, self._cannot_store)
        self.kept: KeptReplies | None = None
        self.recorder = None if policy.record is None else Recorder(policy.record)

    def enter(self, consult: Consult) -> Flight | None:
        """Answer from the cache, join a flight, or open one; returns a flight that is new."""
        consult.key = key = request_key(self._identity, consult.request)
        landed, stored = self._landed, self._stored(key, consult.request)
        if stored is not None:
            self._end(consult, stored)
            return None
        with self.changed:
            if landed != self._landed:  # an equal flight may have landed since the shelf was read
                stored = self._shelf.get(key, consult.request)
            flight = self._flights.get(key) if self._merges and stored is None else None
            if flight is not None:
                self._join(consult, flight)
                consult.merged = True
                self.counters.add("merged")
                return None
            flight = Flight(key, consult.request, consult.submitted)
            failure = stored or self._reserve(flight)
            if failure is None:
                self._join(consult, flight)
                self._flights[key] = flight
        if failure is None:
            return flight
        self._end(consult, failure)
        return None

    def _stored(self, key: str, request: ConsultRequest) -> ExpertReply | None:
        kept = self.kept.get(key, request) if self.kept else None
        return kept or self._shelf.get(key, request)

    def _join(self, consult: Consult, flight: Flight) -> None:
        consult.flight = flight
        flight.waiters.append(consult)
        self.outstanding[consult] = None

    def _reserve(self, flight: Flight) -> ExpertReply | None:
        """Hold the worst case of the next attempt; returns the failure if that cannot be."""
        if self._replays:
            return None
        try:
            flight.reservation = self._hold(flight)
        except Exception as error:  # the expert's own bound is the user's code
            return ExpertReply.failed("malformed", f"worst_case: {type(error).__name__}: {error}")
        if flight.reservation is None:
            return ExpertReply.failed("budget")
        flight.held = flight.reservation.amount.most(flight.held)
        return None

    def _hold(self, flight: Flight) -> Reservation | None:
        worst = worst_case(self.expert, flight.request, self.policy.max_reply_tokens)
        return self.ledger.reserve(flight.request, worst)

    def reserve_again(self, flight: Flight) -> ExpertReply | None:
        """Hold the worst case of a further attempt; returns the failure if that cannot be."""
        return self._reserve(flight)

    def reserve_hedge(self, flight: Flight) -> Reservation | None:
        """Hold the worst case of a call beside the current one; None if the budget forbids it."""
        try:
            extra = self._hold(flight)
        except Exception:  # the expert's own bound is the user's code
            return None
        flight.extra = extra
        if extra is not None and flight.reservation is not None:
            flight.held = extra.amount.plus(flight.reservation.amount).most(flight.held)
        return extra

    def begin(self, flights: Sequence[Flight]) -> list[Flight]:
        """An attempt goes to the expert now; returns the flights that somebody waits for still."""
        now = 0.0 if self._immediate else time.monotonic()
        with self.changed:
            live = [flight for flight in flights if flight.waiters]
            for flight in live:
                flight.attempts += 1
                flight.sent = True
                flight.began = now
        self.counters.add("sent", len(live))
        return live

    def settle(self, flight: Flight, reply: ExpertReply | None) -> None:
        """Close the books of an attempt; None: it was sent and nothing came back."""
        if flight.sent:
            flight.log.append(attempt_of(flight, reply, timed=not self._immediate))
        flight.sent = False
        if flight.reservation is not None:
            self.close_reservation(flight, flight.reservation, reply)
        flight.reservation = None

    def close_reservation(
        self, flight: Flight, reservation: Reservation, reply: ExpertReply | None
    ) -> None:
        """Release or settle what was held for one call; None keeps all of it."""
        if reply is not None and not reply.billed:
            self.ledger.release(reservation)
            return
        usage = reply.usage if reply else None
        with self.changed:  # who ends now carries what is charged now, or somebody after them
            amount = self.ledger.settle(reservation, usage)
            flight.nano += amount.nano
        if not amount.consults:
            return  # closed before, when nobody waited for it any more
        self.counters.charged(usage.tokens if usage else 0, amount.nano / NANO)

    def write_off(self, flight: Flight) -> None:
        """Keep all that is held for calls under way: nobody waits for what they will use."""
        if not flight.sent:
            return
        for reservation in (flight.reservation, flight.extra):
            if reservation is not None:
                self.close_reservation(flight, reservation, None)

    def land(self, flight: Flight, reply: ExpertReply) -> None:
        """End every waiter of the flight; the first of the last to go carries its cost."""
        if reply.status == "ok" and shape(reply, self.policy).status != "malformed":
            self._shelf.put(flight.key, flight.request, reply)
        self._end_all(flight, self.thin(flight, lambda _: True), reply, reply.usage)

    def drop(self, flight: Flight, reply: ExpertReply, hopeless: Callable[[Consult], bool]) -> None:
        """End the waiters that are `hopeless` with a failure; the others wait on."""
        self._end_all(flight, self.thin(flight, hopeless), reply)

    def _end_all(
        self,
        flight: Flight,
        gone: Sequence[Consult],
        reply: ExpertReply,
        usage: Usage | None = None,
    ) -> None:
        cost = 0.0 if flight.waiters else flight.nano / NANO
        for consult in gone:
            self._end(consult, reply, usage, cost)
            usage, cost = None, 0.0

    def thin(self, flight: Flight, goes: Callable[[Consult], bool]) -> list[Consult]:
        """Take waiters off a flight; one without waiters can no longer be joined."""
        with self.changed:
            gone = [consult for consult in flight.waiters if goes(consult)]
            flight.waiters = [consult for consult in flight.waiters if not goes(consult)]
            if not flight.waiters and self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
                self._landed += 1
        return gone

    def quit(self, consult: Consult, status: ConsultStatus) -> Flight | None:
        """End one consult early; returns its flight if nobody waits for that any more."""
        flight = consult.flight
        if flight is None or consult.claimed:
            return None
        with self.changed:
            gone = self.thin(flight, lambda other: other is consult)
            dead = bool(gone) and not flight.waiters
            if dead:
                flight.expired = status == "timeout"
                self.write_off(flight)
        self._end_all(flight, gone, ExpertReply.failed(status, f"ended at {status}"))
        return flight if dead else None

    def decline(self, consult: Consult) -> None:
        """End a consult that the gate refused before dispatch."""
        self.counters.add("saved_by_gate")
        self._end(consult, ExpertReply.failed("declined"))

    def overdue(self, now: float, grace: float) -> list[Consult]:
        """Consults whose deadline passed more than `grace` seconds ago."""
        with self.changed:
            due = takewhile(lambda one: one.deadline + grace <= now, self.outstanding)
            return list(due)

    def next_deadline(self) -> float:
        """The earliest deadline of an open consult; infinite if there is none. Hold `changed`."""
        return next((one.deadline for one in self.outstanding), float("inf"))

    def _end(
        self, consult: Consult, reply: ExpertReply, usage: Usage | None = None, cost: float = 0.0
    ) -> None:
        with self.changed:
            if consult.claimed:
                return
            consult.claimed = True
        self._record(consult, reply)
        try:
            timed = not self._immediate
            result = result_of(consult, reply, usage, cost, self.policy, timed=timed)
        except Exception as error:  # whatever is wrong with a reply, nobody waits for ever
            result = ConsultResult("malformed", cost=cost, detail=brief(repr(error)))
        self.counters.ended(result)
        self._log(result.status if reply.status in ACCEPTED else reply.status, result.detail)
        with self.changed:
            consult.handle._result = result
            self.outstanding.pop(consult, None)
            self.completed += 1
            self.changed.notify_all()

    def _record(self, consult: Consult, reply: ExpertReply) -> None:
        if self.kept is not None and reply.status in ACCEPTED:
            self._write("kept", partial(self.kept.put, consult.key, consult.request, reply))
        if self.recorder is not None and reply.status not in ("declined", "cancelled"):
            self._write("recorded", partial(self.recorder.write, consult.request, reply))

    def _write(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, TypeError, ValueError) as error:
            self._warn_once(what, f"a consult could not be {what}: {error}")

    def _cannot_store(self, error: Exception) -> None:
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
        """Let go of the files."""
        self._shelf.close()
        if self.kept:
            self.kept.close()
        if self.recorder:
            self.recorder.close()
