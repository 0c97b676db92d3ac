"""Stage 2: the repository's own checks of GPU kernels (`tests/kernels/gpu`), side by side.

One run of pytest for each backend, spread over processes: an interpreter with torch takes longer to
start than most checks. Files are told apart by what pytest prints, so that a run that is cut short
says how far it came.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from gpu_check.records import Recorder, Request

_QUICK = ("kv_write", "test_kv_write_of_slices")
"""What stands for them all where sizes are small: the test suite runs the rest."""
_BOTH = ("linear_loss", "linear_plans", "logits_loss")
"""Files of ops whose backend "cuda" has its kernel elsewhere."""

_SHARES = {"triton": 2, "cuda": 4}
"""Of the cores: one in so many gets a process."""

_FOLDER = "tests/kernels/gpu"
_LINE = re.compile(r"check_(\w+)\.py::")
_STATE = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
_SHOWN = 6
"""Failures that are shown of a file."""


def run(request: Request, recorder: Recorder) -> None:
    """Run every file on Triton, and on CUDA those whose op has a CUDA kernel, or that name it."""
    root = Path(request.root)
    names = sorted(p.stem.removeprefix("check_") for p in root.glob(f"{_FOLDER}/check_*.py"))
    if not names:
        recorder.skip(_FOLDER, "not part of this tree")
        return
    groups = {
        "triton": [n for n in names if not n.startswith("cuda_")],
        "cuda": [n for n in names if _on_cuda(n, root)],
    }
    if request.small:
        groups = {"triton": [_QUICK[0]]}
    elif not _has_cuda_module():
        recorder.skip("checks on CUDA", "the CUDA module was not built")
        del groups["cuda"]
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(lambda pair: _run_files(request, recorder, *pair), groups.items()))


_MOST = {"triton": 12, "cuda": 6}
"""Processes at most: each has a context of its own on the GPU."""


def _on_cuda(name: str, root: Path) -> bool:
    own = (root / "kernels" / name / "kernel.cu").exists()
    return own or name.startswith("cuda_") or name in _BOTH


def _run_files(request: Request, recorder: Recorder, backend: str, names: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider", *(f"{_FOLDER}/check_{name}.py" for name in names)]
    if request.small:
        command += ["-k", _QUICK[1]]
    elif request.device == "cuda" and find_spec("xdist"):
        processes = max(2, len(os.sched_getaffinity(0)) // _SHARES[backend])
        processes = min(processes, _MOST[backend])
        command += ["-n", str(processes)]
    log = Path(request.work) / f"checks-{backend}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=request.root,
            env={**os.environ, "EAPO_CHECK": backend, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = process.wait(max(1.0, request.remaining() - 3))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    report(log.read_text(errors="replace"), code, backend, names, recorder)


def report(text: str, code: int | None, backend: str, names: list[str], recorder: Recorder) -> None:
    """Write down what a run printed; `code`: its exit status, None where its time was up."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures: dict[str, list[str]] = {name: [] for name in names}
    for line in text.splitlines():
        named, state = _LINE.search(line), _STATE.search(line)
        if named is None or state is None or named[1] not in counts:
            continue
        if line.startswith(("FAILED", "ERROR")):  # of the summary, with the reason
            failures[named[1]].append(line[:300])
        else:
            counts[named[1]][state[1]] += 1
    for name, found in counts.items():
        label, bad = f"check_{name} {backend}", found["FAILED"] + found["ERROR"]
        whole = {state.lower(): number for state, number in found.items()}
        if code is None and not bad:
            recorder.skip(label, f"the time box was used up; so far {whole or 'nothing'}")
        else:
            passed = not bad and found["PASSED"] > 0
            recorder.check(label, passed, tests=whole, failures=failures[name][:_SHOWN])
    if code not in (0, None) and not any(c["FAILED"] + c["ERROR"] for c in counts.values()):
        last = "\n".join(text.splitlines()[-25:])
        recorder.check(f"checks on {backend} ran", False, status=code, output=last)


def _has_cuda_module() -> bool:
    code = "import torch, eapo_fast._cuda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return done.returncode == 0
