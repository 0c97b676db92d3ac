"""Runs the checks of `gpu/` in processes of their own, whose environment says where they run."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "gpu"
ROOT = Path(__file__).parents[2]


class Checks(NamedTuple):
    """A file of checks, and where it runs."""

    name: str
    """Of `gpu/check_{name}.py`."""
    backend: str
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.backend, self.name])


class Running:
    """Checks that were started together, as many at a time as there are cores."""

    def __init__(self, checks: list[Checks]) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._done: dict[Checks, Future[Any]] = {c: self._pool.submit(run, c) for c in checks}

    def expect(self, checks: Checks) -> None:
        """Wait for checks; fail with pytest's report unless all of them passed."""
        passed(self._done[checks].result())

    def close(self) -> None:
        """Start no more of them."""
        self._pool.shutdown(cancel_futures=True)


def run(checks: Checks) -> subprocess.CompletedProcess[str]:
    """Run a file of checks."""
    path = FOLDER / f"check_{checks.name}.py"
    own = {"EAPO_CHECK": checks.backend, "OMP_NUM_THREADS": "1", **dict(checks.environment)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(path)],
        env={**os.environ, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def passed(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with pytest's report unless all tests of a run passed."""
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
