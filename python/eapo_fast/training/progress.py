"""Small accountants of a run: means over logging steps, seconds by phase."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Means:
    """Averages metrics between two log lines; extremes stay extremes, the clock adds up."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        for name, value in metrics.items():
            self._values[name].append(value)

    def state_dict(self) -> dict[str, list[float]]:
        """Return what has come in since the last drain."""
        return {name: list(values) for name, values in self._values.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore what `state_dict` gave."""
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})

    def drain(self) -> dict[str, float]:
        """Return one value per metric (NaN left out, unless there is nothing else)."""
        values = {name: _joined(name, v) for name, v in self._values.items()}
        self._values.clear()
        return values


class Phases:
    """Wall-clock seconds of each phase, of this step and of the whole run."""

    def __init__(self) -> None:
        self.total: defaultdict[str, float] = defaultdict(float)
        self._step: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.total[name] += spent
            self._step[name] += spent

    def drain_step(self) -> dict[str, float]:
        """Return `perf/<phase>_s` since the last call."""
        values = {f"perf/{name}_s": spent for name, spent in self._step.items()}
        self._step.clear()
        return values


def _joined(name: str, values: list[float]) -> float:
    values = [v for v in values if v == v] or [math.nan]
    if name in ("learning_rate", "num_tokens", "epoch"):
        return values[-1]
    if name.endswith("max"):
        return max(values)
    if name.endswith(("min", "/min_length")):
        return min(values)
    return sum(values) / len(values)
