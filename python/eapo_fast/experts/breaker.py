"""A circuit breaker: an expert that is down gets one probe per period and nothing else."""

from __future__ import annotations

from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """Closed -> open after `failures` in a row -> half open (one probe) -> closed or open.

    Times are the caller's monotonic seconds. Not thread-safe: one event loop owns it.
    """

    def __init__(self, failures: int, period: float) -> None:
        self.failures = failures
        self.period = period
        self.state: BreakerState = "closed"
        self.opened = 0
        self._row = 0
        self._until = 0.0

    def allow(self, now: float) -> bool:
        """Whether a call may be made; when open and due, a True grants the single probe."""
        if self.state == "closed":
            return True
        if self.state == "open" and now >= self._until:
            self.state = "half_open"
            return True
        return False

    def success(self) -> None:
        """The expert answered, be it with a refusal."""
        self.state = "closed"
        self._row = 0

    def failure(self, now: float) -> None:
        """A call failed or never came back."""
        self._row += 1
        if self.state == "half_open" or (self.state == "closed" and self._row >= self.failures):
            self.state = "open"
            self.opened += 1
            self._until = now + self.period

    def abandon(self, now: float) -> None:
        """A call ended without saying anything about the expert; a probe may be made again."""
        if self.state == "half_open":
            self.state = "open"
            self._until = now
