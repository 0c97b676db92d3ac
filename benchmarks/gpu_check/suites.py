"""Stage 2: the repository's own checks of GPU kernels (`tests/kernels/gpu`), side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from gpu_check.records import Recorder, Request

_QUICK = ("kv_write", "test_kv_write_of_slices")
"""What stands for them all where sizes are small: the test suite runs the rest."""

_ON_THE_LIBRARY = ("linear_loss", "linear_plans")
"""Checks of ops whose backend "cuda" multiplies by torch."""


def run(request: Request, recorder: Recorder) -> None:
    """Run every file on Triton, and on CUDA those whose op has a CUDA kernel, or that name it."""
    root = Path(request.root)
    names = sorted(p.stem.removeprefix("check_") for p in root.glob("tests/kernels/gpu/check_*.py"))
    if not names:
        recorder.skip("tests/kernels/gpu", "not part of this tree")
        return
    alone = [n for n in names if n.startswith("cuda_")]
    pairs = [("triton", name) for name in names if name not in alone]
    pairs += [("cuda", name) for name in alone]
    pairs += [
        ("cuda", name)
        for name in names
        if (root / "kernels" / name / "kernel.cu").exists() or name in _ON_THE_LIBRARY
    ]
    if request.small:
        pairs = [("triton", _QUICK[0])]
    workers = 1 if request.device == "cpu" else max(2, len(os.sched_getaffinity(0)) // 3)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda pair: _run_file(request, recorder, *pair), pairs))


def _run_file(request: Request, recorder: Recorder, backend: str, name: str) -> None:
    label = f"check_{name} {backend}"
    if backend == "cuda" and not _has_cuda_module():
        recorder.skip(label, "the CUDA module was not built")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"tests/kernels/gpu/check_{name}.py"]
    if request.small:
        command += ["-k", _QUICK[1]]
    elif request.device == "cuda" and find_spec("xdist"):
        command += ["-n", "4"]  # compiling takes most of the time
    try:
        done = subprocess.run(
            command,
            cwd=request.root,
            env={**os.environ, "EAPO_CHECK": backend, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, request.remaining() - 2),
            check=False,
        )
    except subprocess.TimeoutExpired:
        recorder.check(label, False, error="the time box was used up")
        return
    lines = done.stdout.splitlines()
    passed = done.returncode == 0 and " passed" in done.stdout
    shown = lines[-1:] if passed else lines[-25:]
    recorder.check(label, passed, result="\n".join(shown))


def _has_cuda_module() -> bool:
    code = "import torch, eapo_fast._cuda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return done.returncode == 0
