"""Counters of one scheduler, drained into `expert/...` metrics."""

from __future__ import annotations

import threading
from collections import Counter

from eapo_fast.experts.base import STATUSES, ConsultResult

COUNTS = (
    "asked",
    "sent",
    "saved_by_gate",
    "merged",
    "retries",
    "hedges",
    "hedges_won",
    "hedges_refused",
    "blocked_by_breaker",
    "truncated",
)
"""Counters besides the statuses."""


class Counters:
    """Thread-safe sums since the last drain."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._typical: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._counts: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._cost = 0.0
        self._tokens = 0
        self._limit = 0

    def add(self, name: str, amount: int = 1) -> None:
        """Count an event."""
        with self._lock:
            self._counts[name] += amount

    def ended(self, result: ConsultResult) -> None:
        """Count the end of a consult."""
        with self._lock:
            self._counts[result.status] += 1
            self._counts["accepted"] += result.accepted
            self._counts["truncated"] += result.truncated
            if result.accepted:
                self._latencies.append(result.latency)
                before = self._typical
                self._typical = (
                    result.latency if before is None else before + (result.latency - before) / 8
                )

    def typical_latency(self, unknown: float) -> float:
        """Return the running mean of the latencies of answers, seconds; `unknown` before any."""
        with self._lock:
            return unknown if self._typical is None else self._typical

    def limit(self, calls: int) -> None:
        """Note how many calls at once the expert is trusted with now."""
        with self._lock:
            self._limit = min(calls, self._limit or calls)

    def charged(self, tokens: int, cost: float) -> None:
        """Count what a call was charged."""
        with self._lock:
            self._tokens += tokens
            self._cost += cost

    def drain(self) -> dict[str, float]:
        """All metrics since the last drain; the set of names never changes."""
        with self._lock:
            counts, latencies = self._counts, sorted(self._latencies)
            tokens, cost, limit = self._tokens, self._cost, self._limit
            self._reset()
        share = counts["accepted"] / counts["asked"] if counts["asked"] else 0.0
        values = {name: float(counts[name]) for name in (*COUNTS, *STATUSES)}
        values |= {"accepted_share": share, "tokens": float(tokens), "cost": cost}
        values |= {"concurrency": float(limit)}
        shared = (counts["merged"] + counts["cached"]) / max(
            1, counts["asked"] - counts["declined"]
        )
        values |= {"shared_share": min(1.0, shared)}
        values |= {f"latency_p{q}": _rank(latencies, q / 100) for q in (50, 90, 99)}
        return {f"expert/{name}": value for name, value in values.items()}


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
