"""Runs stages as processes with time boxes, alone or side by side."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.records import Request, read_records

_LOG_LINES = 40
_live: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Stage:
    """One process of the run."""

    name: str
    module: str
    """Its `run(request, recorder)` is the stage."""
    number: int
    """Stages of one number run side by side on a GPU machine."""
    seconds: float
    """Time box."""
    needs: tuple[str, ...] = ()
    """Modules without which there is nothing to do."""
    group: str = ""
    """Name by which several stages are picked together."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What sets apart stages of one module."""
    elastic: bool = False
    """Whether it may also use what the stages before it left of their boxes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    status: str
    """passed, failed, crashed, timed out or skipped."""
    seconds: float
    records: list[dict[str, Any]]
    message: str = ""
    """Why it was skipped, or the end of what it printed where it did not pass."""

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as it goes into the report."""
        return {
            "stage": self.stage,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            **({"message": self.message} if self.message else {}),
            "records": self.records,
        }


def run_side_by_side(
    requests: Sequence[tuple[Stage, Request]],
    environment: Mapping[str, str],
    *,
    at_once: int,
    **boxes: float,
) -> list[Outcome]:
    """Run stages, at most `at_once` of them at a time; returns their outcomes in order.

    `boxes`: `scale` and `until` of `run_stage`.
    """

    def run(pair: tuple[Stage, Request]) -> Outcome:
        try:
            return run_stage(*pair, environment, **boxes)
        except Exception as error:  # a full disk, say: the other stages go on
            message = f"the driver could not run it: {type(error).__name__}: {error}"
            return Outcome(pair[0].name, "crashed", 0.0, [], message)

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        return list(pool.map(run, requests))


def run_stage(
    stage: Stage,
    request: Request,
    environment: Mapping[str, str],
    *,
    scale: float = 1.0,
    until: float = 0.0,
) -> Outcome:
    """Run one stage in a process group of its own, ended as a whole when its time is up.

    Its box, `scale` times its seconds, begins now, and lasts until the Unix time `until` at least
    where the stage is elastic; the request's deadline is that of the whole run.
    """
    box = time.time() + scale * stage.seconds
    deadline = min(request.deadline, max(box, until) if stage.elastic else box)
    request = dataclasses.replace(request, deadline=deadline)
    log = Path(request.results).with_suffix(".log")
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_check.child", stage.module, request.to_json()],
            env={**os.environ, **environment},
            cwd=request.work,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        _live.add(process)
        try:
            code: int | None = process.wait(max(0.1, request.remaining()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    records = read_records(Path(request.results))
    status = _status(code, records)
    message = "" if status in ("passed", "skipped") else _tail(log)
    return Outcome(stage.name, status, time.monotonic() - start, records, message)


def end_all() -> None:
    """End the processes of all stages that run, for a driver that is being ended itself."""
    for process in list(_live):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the process group."""
    _live.discard(process)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _status(code: int | None, records: Sequence[Mapping[str, Any]]) -> str:
    if code is None:
        return "timed out"
    if any(r["kind"] == "check" and not r["passed"] for r in records):
        return "failed"
    if code != 0:
        return "crashed"
    done = [r for r in records if r["kind"] != "skip"]
    return "passed" if done else "skipped"


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"its log cannot be read: {error}"
    return "\n".join(line[:400] for line in lines[-_LOG_LINES:])
