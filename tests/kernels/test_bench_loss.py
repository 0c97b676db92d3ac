"""The loss benchmark compares every side's values, and says why one is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_loss.py"
TIMED = ["bare", "reference", "cpu", "cpu 40 % active", "eager"]
INTERPRETED = ["triton", "triton 40 % active"]
ABSENT = ["cuda"]


def test_every_side_has_a_line(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable, "-W", "ignore", str(SCRIPT), "--sizes", "tiny", "--dtypes", "float32",
        "--repeats", "1", "--json", str(tmp_path / "out.json"),
        "--sides", *TIMED, *INTERPRETED, *ABSENT,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = done.stdout.splitlines()
    for side in (*TIMED, *INTERPRETED, *ABSENT):
        (line,) = (line for line in found if line.startswith(f"  {side:18} "))
        assert ("values agree" in line) == (side in INTERPRETED)
        assert ("of the floor" in line) == (side in TIMED)
    written = json.loads((tmp_path / "out.json").read_text())["tiny float32"]
    assert {"ms", "flop", "bytes", "extra_bytes", "share_of_floor"} <= written[0].keys()
    assert {line["side"] for line in written} == set(TIMED)
