"""What a stage is asked to do, and what it writes down: one JSON line for each finding."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16")


class RefusedError(Exception):
    """A backend cannot run an op here: a finding, not a failure."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the driver hands to the process of a stage."""

    stage: str
    device: str
    """"cuda" or "cpu" (reference devices: Triton is interpreted, nothing is captured)."""
    small: bool
    """Sizes that take a CPU seconds."""
    seed: int
    """Of all random inputs."""
    root: str
    """The source tree."""
    work: str
    """A scratch folder that all stages of a run share."""
    results: str
    """The file of the findings, JSON lines."""
    deadline: float
    """Unix time at which the process is ended."""
    gpu: str = ""
    """Name of the GPU; bars in milliseconds are judged on an H200 only."""
    options: dict[str, Any] = field(default_factory=dict)

    def remaining(self) -> float:
        """Return the seconds left."""
        return self.deadline - time.time()

    def to_json(self) -> str:
        """Return the request as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Bar:
    """A figure to reach: at least or at most `value`."""

    sense: str
    """">=" or "<="."""
    value: float
    on: str = ""
    """Part of the GPU's name that the bar was stated for; empty: any."""

    def met(self, value: float, gpu: str) -> bool | None:
        """Return whether `value` reaches the bar, or None on a GPU that it was not stated for."""
        if self.on not in gpu:
            return None
        if not math.isfinite(value):
            return False
        return value >= self.value if self.sense == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:g}" + (f" ({self.on})" if self.on else "")


class Recorder:
    """Appends findings to the file of a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._path = Path(request.results)
        self._reasons: set[str] = set()

    def check(self, name: str, passed: bool, **detail: Any) -> None:
        """Write down whether something that must hold does."""
        self._add("check", name, passed=bool(passed), **detail)

    def figure(
        self, name: str, value: float, unit: str, bar: Bar | None = None, **detail: Any
    ) -> None:
        """Write down a measurement, beside the bar that it should reach on a GPU."""
        judged = bar is not None and self.request.device == "cuda"
        met = bar.met(value, self.request.gpu) if bar and judged else None
        self._add("figure", name, value=value, unit=unit, bar=str(bar or ""), passed=met, **detail)

    def skip(self, name: str, reason: str) -> None:
        """Write down what was not done, and why; the same for an op's other dtypes is left out."""
        first, _, last = name.rpartition(" ")
        key = f"{first if last in _DTYPES else name}: {reason}"
        if key in self._reasons:
            return
        self._reasons.add(key)
        self._add("skip", name, reason=reason)

    def note(self, name: str, **detail: Any) -> None:
        """Write down anything else."""
        self._add("note", name, **detail)

    @contextmanager
    def guard(self, name: str, *, optional: bool = False) -> Iterator[None]:
        """Turn an error of the block into a failed check, or into a skip where it is `optional`."""
        try:
            yield
        except RefusedError as error:
            self.skip(name, str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            if optional:
                self.skip(name, reason)
            else:
                traceback.print_exc()
                self.check(name, False, error=reason)

    def _add(self, kind: str, name: str, **detail: Any) -> None:
        line = json.dumps({"kind": kind, "name": name, **detail}, default=str)
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(f"[{self.request.stage}] {line}", flush=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the findings of a file; a line that its writer did not finish is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
