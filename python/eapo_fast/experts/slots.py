"""Concurrency that finds the server's own limit: halved by 429, grown slowly by answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque


class Slots:
    """At most `limit` calls at once, first come, first served. Belongs to one event loop.

    The limit starts at `most`. A call that is told "too many" halves it (from the number of calls
    at work), unless another one that began under the same limit has done so already: a burst of
    refusals says one thing, not many. Each answer adds 1/limit, so one more call is tried for each
    round of answers (additive increase, multiplicative decrease, as TCP does it).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.busy = 0
        self.cuts = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def locked(self) -> bool:
        """Whether a call that begins now would have to wait."""
        return self.busy >= int(self.limit) or bool(self._waiting)

    async def __aenter__(self) -> None:
        if not self.locked():
            self.busy += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                await self.__aexit__()  # the turn had come, and goes to the next one
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(turn)
            raise

    async def __aexit__(self, *_: object) -> None:
        self.busy -= 1
        self._wake()

    def too_many(self, cuts: int) -> None:
        """A call that began when `self.cuts` was `cuts` was refused for the number of calls."""
        if cuts == self.cuts:
            self.cuts += 1
            self.limit = max(1.0, min(self.limit, float(self.busy)) / 2)

    def answered(self) -> None:
        """A call was answered."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.busy < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.busy += 1
                turn.set_result(None)
