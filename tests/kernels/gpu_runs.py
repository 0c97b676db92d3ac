"""Runs the checks of `gpu/` in a process of their own, whose environment says where they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "gpu"
ROOT = Path(__file__).parents[2]


def run_checks(name: str, backend: str, **environment: str) -> None:
    """Fail with pytest's report unless all tests of `gpu/check_{name}.py` pass."""
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER / f"check_{name}.py")]
    done = subprocess.run(
        command,
        env={**os.environ, "EAPO_CHECK": backend, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
