"""Requests and records for the stages of `benchmarks/gpu_check`, which run small on a CPU here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

if not (BENCHMARKS / "gpu_check").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path[:0] = [str(BENCHMARKS), str(Path(__file__).parent)]


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., Any]:
    """Make the request of a stage: `make_request("sampler", gpu="NVIDIA H200")`."""
    from gpu_check.records import Request

    def make(stage: str, *, seconds: float = 120.0, **changes: Any) -> Any:
        (tmp_path / "work").mkdir(exist_ok=True)
        settings = {
            "stage": stage,
            "device": "cpu",
            "small": True,
            "seed": 7,
            "root": str(BENCHMARKS.parent),
            "work": str(tmp_path / "work"),
            "results": str(tmp_path / "work" / f"{stage}.jsonl"),
            "deadline": time.time() + seconds,
        }
        return Request(**settings | changes)

    return make


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables under which processes of stages find their modules and the interpreter."""
    variables = {"PYTHONPATH": str(BENCHMARKS), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables
