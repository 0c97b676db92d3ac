"""A second call beside one that is late: the first good reply counts, both are paid for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from eapo_fast.experts.base import ACCEPTED, Attempt, ExpertReply
from eapo_fast.experts.budget import Reservation
from eapo_fast.experts.calling import call_expert
from eapo_fast.experts.slots import Slots

if TYPE_CHECKING:
    from eapo_fast.experts.board import Board
    from eapo_fast.experts.flights import Flight

Calling = asyncio.Task[list[ExpertReply]]


class Hedges:
    """Asks for single requests, with at most one hedge each. Belongs to the loop thread.

    A hedge is sent only if somebody still waits, its worst case fits the budget, a concurrency
    slot is free at once, and hedges stay under their share of the calls.
    """

    def __init__(self, board: Board, slots: Slots) -> None:
        self._board = board
        self._slots = slots
        self._asked = 0
        self._sent = 0

    async def ask(self, flight: Flight) -> ExpertReply:
        """The reply to the flight's request; the reservation left is that of the reply."""
        self._asked += 1
        first = self._start(call_expert(self._board.expert, [flight.request]))
        try:
            await asyncio.wait({first}, timeout=self._board.policy.hedge_after)
            if not first.done() and self._may(flight):
                extra = self._board.reserve_hedge(flight)
                if extra is not None:
                    return await self._race(flight, first, extra)
                self._board.counters.add("hedges_refused")
            return (await first)[0]
        finally:
            await _end(first)

    def _may(self, flight: Flight) -> bool:
        allowed = 1 + self._board.policy.hedge_share * self._asked
        return bool(flight.waiters) and not self._slots.locked() and self._sent < allowed

    async def _race(self, flight: Flight, first: Calling, extra: Reservation) -> ExpertReply:
        self._sent += 1
        self._board.counters.add("hedges")
        self._board.counters.add("sent")
        began = time.monotonic()
        second = self._start(call_expert(self._board.expert, [flight.request]))
        settled = False
        try:
            async with self._slots:
                winner = await _first_good(first, second)
            loser = second if winner is first else first
            lost = loser.result()[0] if loser.done() else None
            if winner is second and flight.reservation is not None:
                extra, flight.reservation = flight.reservation, extra
                self._board.counters.add("hedges_won")
            self._board.close_reservation(flight, extra, lost)
            settled = True
            return winner.result()[0]
        finally:
            await _end(second)
            self._note(flight, began, second)
            if not settled:  # cancelled: what was sent may have been billed
                self._board.close_reservation(flight, extra, None)

    def _note(self, flight: Flight, began: float, call: Calling) -> None:
        reply = None if call.cancelled() else call.result()[0]
        flight.log.append(
            Attempt(
                began - flight.opened,
                time.monotonic() - began,
                reply.status if reply else "cancelled",
                reply.expert if reply else None,
                hedge=True,
            )
        )

    @staticmethod
    def _start(call: Coroutine[Any, Any, list[ExpertReply]]) -> Calling:
        return asyncio.ensure_future(call)


async def _first_good(first: Calling, second: Calling) -> Calling:
    """The call whose accepted reply came first; if both fail, the one that failed last."""
    done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    early = first if first in done else second
    if early.result()[0].status in ACCEPTED:
        return early
    late = second if early is first else first
    await asyncio.wait({late})
    return late


async def _end(call: Calling) -> None:
    """Cancel a call that nobody waits for and see it end."""
    if not call.done():
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
