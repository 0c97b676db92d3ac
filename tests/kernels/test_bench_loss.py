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
OTHERS = ["triton", "cuda", "liger", "liger triton"]


def lines(*arguments: object, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--sizes", "tiny", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_every_side_has_a_line(tmp_path: Path) -> None:
    found = lines("--dtypes", "float32", "--repeats", 1, "--sides", *TIMED, *OTHERS,
                  "--json", tmp_path / "out.json", TRITON_INTERPRET="0")  # fmt: skip
    for side in (*TIMED, *OTHERS):
        assert sum(line.startswith(f"  {side:18} ") for line in found) == 1, side
    written = json.loads((tmp_path / "out.json").read_text())["tiny float32"]
    assert {"ms", "flop", "bytes", "extra_bytes", "share_of_floor"} <= written[0].keys()
    assert {line["side"] for line in written} >= set(TIMED)


def test_interpreted_kernels_are_compared() -> None:
    pytest.importorskip("triton")
    found = lines("--dtypes", "bfloat16", "--repeats", 1, "--sides", "triton", TRITON_INTERPRET="1")
    assert any("triton " in line and "values agree" in line for line in found)
