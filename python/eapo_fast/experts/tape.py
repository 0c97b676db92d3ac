"""What the clock decides while rollouts are collected, so that a recorded run can be replayed.

Three things depend on real time: the engine step at which a reply joins its row, how long the
engine expects a parked row to wait, and how fast it believes prefill to be (both decide which KV
blocks are given away). Everything else is a keyed draw. A tape writes the three down, or gives
them back as they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eapo_fast.experts.base import ReplayMismatch

Row = tuple[int, int, int]
"""(prompt, rollout, turn) of a parked row."""


class Tape:
    """Neither records nor replays: replies join as they come."""

    replays = False

    def wait(self, row: Row, seconds: float) -> float:
        """The wait that the engine is told for a row parked just now; `seconds` is the estimate."""
        return seconds

    def due(self, tick: int, ready: Sequence[Row], *, idle: bool) -> list[Row]:
        """Which of the `ready` rows go on after engine step `tick`, in this order."""
        return list(ready)

    def rate(self, tick: int, measured: float) -> float:
        """The prefill rate, tokens a second, that the engine is to believe after step `tick`."""
        return measured

    def finish(self) -> None:
        """The collection is complete."""


class RecordingTape(Tape):
    """Writes one line for each engine step after which something was decided."""

    def __init__(self, write: Callable[[Mapping[str, Any]], None], step: int, part: int) -> None:
        self._write = write
        self._place = {"step": step, "part": part}
        self._tick = 0
        self._rate = 0.0
        self._event: dict[str, Any] = {}
        write({"kind": "begin", **self._place})

    def wait(self, row: Row, seconds: float) -> float:
        """Note the wait of a row."""
        self._event.setdefault("waits", []).append([*row, seconds])
        return seconds

    def due(self, tick: int, ready: Sequence[Row], *, idle: bool) -> list[Row]:
        """Note the rows that go on."""
        self._turn_to(tick)
        if ready:
            self._event.setdefault("inject", []).extend([*row] for row in ready)
        return list(ready)

    def rate(self, tick: int, measured: float) -> float:
        """Note a rate that changed."""
        self._turn_to(tick)
        if measured != self._rate:
            self._event["rate"] = self._rate = measured
        return measured

    def finish(self) -> None:
        """Write what is left."""
        self._turn_to(self._tick + 1)

    def _turn_to(self, tick: int) -> None:
        if tick == self._tick:
            return
        if self._event:
            self._write({"kind": "tick", **self._place, "tick": self._tick, **self._event})
        self._tick, self._event = tick, {}


class ReplayingTape(Tape):
    """Gives back what a recording holds about one collection."""

    replays = True

    def __init__(self, lines: Iterable[Mapping[str, Any]], name: str) -> None:
        self._name = name
        self._rates: dict[int, float] = {}
        self._due: dict[int, list[Row]] = {}
        self._waits: dict[Row, float] = {}
        self._rate = 0.0
        for line in lines:
            tick = int(line["tick"])
            if "rate" in line:
                self._rates[tick] = float(line["rate"])
            self._due.setdefault(tick, []).extend(_row(row) for row in line.get("inject", ()))
            self._waits |= {_row(row): float(row[3]) for row in line.get("waits", ())}

    def wait(self, row: Row, seconds: float) -> float:
        """The recorded wait of a row."""
        if row not in self._waits:
            raise self._mismatch(f"no consult of (prompt, rollout, turn) {row}")
        return self._waits[row]

    def due(self, tick: int, ready: Sequence[Row], *, idle: bool) -> list[Row]:
        """The rows that went on after this step; ReplayMismatch if they cannot now."""
        rows = self._due.pop(tick, [])
        missing = set(rows) - set(ready)
        if missing:
            raise self._mismatch(f"{min(missing)} going on after engine step {tick}, not later")
        if idle and not rows and ready:
            raise self._mismatch(f"the engine with work after step {tick}, where now all rows wait")
        return rows

    def rate(self, tick: int, measured: float) -> float:
        """The recorded rate."""
        self._rate = self._rates.get(tick, self._rate)
        return self._rate

    def _mismatch(self, held: str) -> ReplayMismatch:
        return ReplayMismatch(
            f"{self._name} has {held}: this run goes another way than the recorded one. Replay "
            "with the same model, data, seed, settings, threads and machine kind."
        )


def _row(values: Sequence[Any]) -> Row:
    return (int(values[0]), int(values[1]), int(values[2]))
