"""The loop thread's half: batches, concurrency, deadlines, retries and the breaker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from eapo_fast._core import keyed_uniform
from eapo_fast.experts.base import ACCEPTED, ExpertReply
from eapo_fast.experts.board import Board
from eapo_fast.experts.breaker import Breaker
from eapo_fast.experts.calling import call_expert
from eapo_fast.experts.flights import Consult, Flight
from eapo_fast.experts.hedging import Hedges
from eapo_fast.experts.slots import Slots

BACKOFF_BASE = 0.5
BACKOFF_CAP = 8.0
PAUSE_CAP = 120.0
"""Longest time, in seconds, for which one Retry-After holds back everybody."""


def backoff(seed: int, flight: Flight) -> float:
    """Full jitter in seconds, doubling per attempt; the draw is keyed by place and attempt."""
    draw = keyed_uniform(seed, "retry", (*flight.request.place, flight.attempts))
    return draw * min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** (flight.attempts - 1))


@dataclass(slots=True, eq=False)
class Call:
    """One call of the expert."""

    flights: list[Flight]
    """What it carries, in order."""
    task: asyncio.Task[None] | None = None
    """Its task."""


class Dispatcher:
    """Sends flights to the expert. Every method runs on the loop thread."""

    def __init__(self, board: Board, loop: asyncio.AbstractEventLoop, seed: int) -> None:
        policy = board.policy
        self.board = board
        self.loop = loop
        self.seed = seed
        self.breaker = Breaker(policy.breaker_failures, policy.breaker_period)
        self._batch_size = max(1, int(board.expert.max_batch_size))
        self._slots = Slots(policy.max_concurrency)
        self._pending: deque[Flight] = deque()
        self._age: asyncio.TimerHandle | None = None
        self._resume_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._hedges = Hedges(board, self._slots)

    def admit(self, consult: Consult, flight: Flight | None) -> None:
        """Watch the deadline of a new consult and queue its flight if that is new too."""
        if not consult.claimed:
            consult.timer = self.loop.call_at(consult.deadline, self._expire, consult)
        if flight is not None:
            self._enqueue(flight)

    def _expire(self, consult: Consult) -> None:
        dead = self.board.quit(consult, "timeout")
        if dead is not None:
            self.reap(dead)

    def reap(self, flight: Flight) -> None:
        """Stop work that nobody waits for: cancel its call, or give its money back."""
        call = flight.call
        if call is None:
            self.board.settle(flight, _unbilled())
        elif call.task is not None and not any(other.waiters for other in call.flights):
            call.task.cancel()

    def _enqueue(self, flight: Flight) -> None:
        self._pending.append(flight)
        if len(self._pending) >= self._batch_size:
            self._launch()
        elif self._age is None:
            self._age = self.loop.call_later(self.board.policy.max_wait, self.flush)

    def flush(self) -> None:
        """Send everything queued, in batches that may be short."""
        while self._pending:
            self._launch()

    def _launch(self) -> None:
        size = min(self._batch_size, len(self._pending))
        taken = [self._pending.popleft() for _ in range(size)]
        if self._age is not None and not self._pending:
            self._age.cancel()
            self._age = None
        flights = [flight for flight in taken if flight.waiters]
        if not flights:
            return
        call = Call(flights)
        for flight in flights:
            flight.call = call
        call.task = self.loop.create_task(self._carry(call))
        self._tasks.add(call.task)
        call.task.add_done_callback(partial(self._ended, call))

    def _ended(self, call: Call, task: asyncio.Task[None]) -> None:
        """Forget a task; one that was cancelled before its first step has not settled anything.

        A fault of ours in it is an outcome too: nobody waits for a deadline because of it.
        """
        self._tasks.discard(task)
        if any(flight.call is call for flight in call.flights):
            self._abandon(call)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            reply = ExpertReply.failed("malformed", f"{type(error).__name__}: {error}")
            for flight in call.flights:
                self._land(flight, reply)

    async def _carry(self, call: Call) -> None:
        try:
            await self._rest(call.flights)
            async with self._slots:
                outcomes = await self._attempt(call.flights)
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        for flight in call.flights:
            flight.call = None
        for flight, reply in outcomes:
            self._after(flight, reply)

    async def _rest(self, flights: Sequence[Flight]) -> None:
        """Wait while the expert asked everybody to; those who cannot wait so long end now."""
        while (rest := self._resume_at - self.loop.time()) > 0:
            reply = ExpertReply.failed("rate", "the expert's pause outlasts the deadline")
            for flight in flights:
                self._drop_late(flight, reply, self._resume_at)
            if not any(flight.waiters for flight in flights):
                return
            await asyncio.sleep(rest)

    async def _attempt(self, flights: Sequence[Flight]) -> list[tuple[Flight, ExpertReply]]:
        waited = [flight for flight in flights if flight.waiters]
        if waited and not self.breaker.allow(self.loop.time()):
            self.board.counters.add("blocked_by_breaker", len(waited))
            blocked = ExpertReply.failed("down", "left alone after failures", billed=False)
            return [(flight, blocked if flight in waited else _unbilled()) for flight in flights]
        live = self.board.begin(waited)
        dead = [(flight, _unbilled()) for flight in flights if flight not in live]
        if not live:
            if waited:
                self.breaker.abandon(self.loop.time())
            return dead
        cuts = self._slots.cuts
        replies = await self._ask(live)
        self._judge(replies, cuts)
        return [*dead, *zip(live, replies, strict=True)]

    async def _ask(self, flights: Sequence[Flight]) -> list[ExpertReply]:
        requests = [flight.request for flight in flights]
        probing = self.breaker.state != "closed"  # a probe is one call
        if self.board.policy.hedge_after is None or len(flights) > 1 or probing:
            return await call_expert(self.board.expert, requests)
        return [await self._hedges.ask(flights[0])]

    def _judge(self, replies: Sequence[ExpertReply], cuts: int) -> None:
        now = self.loop.time()
        if any(reply.status == "rate" for reply in replies):
            self._slots.too_many(cuts)
        elif any(reply.status == "ok" for reply in replies):
            self._slots.answered()
        self.board.counters.limit(int(self._slots.limit))
        if all(reply.status == "down" for reply in replies):
            self.breaker.failure(now)
        else:
            self.breaker.success()
        pauses = [reply.retry_after or 0.0 for reply in replies if reply.status == "rate"]
        if pauses:
            self._resume_at = max(self._resume_at, now + min(PAUSE_CAP, max(pauses)))

    def _abandon(self, call: Call) -> None:
        """A call was cancelled: what was sent may have been billed."""
        now = self.loop.time()
        if any(flight.sent and flight.expired for flight in call.flights):
            self.breaker.failure(now)
        elif any(flight.sent for flight in call.flights):
            self.breaker.abandon(now)
        for flight in call.flights:
            if flight.call is call:
                flight.call = None
                self.board.settle(flight, None if flight.sent else _unbilled())

    def _after(self, flight: Flight, reply: ExpertReply) -> None:
        self.board.settle(flight, reply)
        blocked = self.breaker.state != "closed" and reply.status == "down"
        if reply.status in ACCEPTED or not reply.retry or blocked:
            self._land(flight, reply)
            return
        for consult in flight.waiters:
            consult.failures[reply.status] += 1
        gives_up = self.board.policy.gives_up
        self.board.drop(flight, reply, lambda consult: gives_up(consult.failures))
        delay = max(backoff(self.seed, flight), reply.retry_after or 0.0)
        self._drop_late(flight, reply, self.loop.time() + delay)
        if flight.waiters:
            self.loop.call_later(delay, self._retry, flight)

    def _drop_late(self, flight: Flight, reply: ExpertReply, moment: float) -> None:
        self.board.drop(flight, reply, lambda consult: consult.deadline <= moment)

    def _retry(self, flight: Flight) -> None:
        if not flight.waiters:
            return
        failure = self.board.reserve_again(flight)
        if failure is None:
            self.board.counters.add("retries")
            self._enqueue(flight)
        else:
            self._land(flight, failure)

    def _land(self, flight: Flight, reply: ExpertReply) -> None:
        for consult in flight.waiters:
            if consult.timer is not None:
                consult.timer.cancel()
        self.board.land(flight, reply)


def _unbilled() -> ExpertReply:
    return ExpertReply.failed("cancelled", billed=False)
