"""Stage 2: compute-sanitizer over the CUDA kernels, where it works.

Inside some virtual machines it refuses the device; that is found out first, on a launch of torch's.
The run below it is the CUDA part of `gpu_check.correctness` at small sizes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from gpu_check.environment import find_tool
from gpu_check.records import Recorder, Request, read_records

TOOLS = ("memcheck", "racecheck", "synccheck")
"""Tools of compute-sanitizer, in the order in which they are run while there is time; initcheck
takes torch's own buffers for uninitialised memory."""
OPS = ("kv_write", "copy_blocks", "sample", "paged_attention", "group_advantages",
       "logits_policy_loss")  # fmt: skip
"""Ops with CUDA kernels of our own; those of cuBLAS are not ours to judge."""
_ERROR_CODE = 97
_PATIENCE = 45
"""Seconds for one launch of torch's."""
_ALONE = "import torch; torch.ones(64, device='cuda').sum().item()"


def run(request: Request, recorder: Recorder) -> None:
    """Run each tool over the CUDA kernels."""
    program = find_tool("compute-sanitizer")
    reason = _reason(request, program)
    if program is None or reason:
        recorder.skip("compute-sanitizer", reason or "not found")
        return
    code, output = _sanitize(
        program, "memcheck", [sys.executable, "-c", _ALONE], request, _PATIENCE
    )
    if code is None:
        recorder.skip("compute-sanitizer", f"torch alone took more than {_PATIENCE} s under it")
        return
    if code != 0:
        recorder.skip("compute-sanitizer", f"does not work here: {_first_error(output)}")
        return
    for tool in TOOLS:
        if request.remaining() < 12:
            recorder.skip(f"compute-sanitizer {tool}", "the time box is used up")
        else:
            _run_tool(program, tool, request, recorder)


def _reason(request: Request, program: str | None) -> str:
    if request.device != "cuda":
        return "there is no GPU"
    if find_spec("eapo_fast._cuda") is None:
        return "the CUDA module was not built"
    return "" if program else "not found"


def _run_tool(program: str, tool: str, request: Request, recorder: Recorder) -> None:
    inner = dataclasses.replace(
        request,
        stage="cuda",
        options={"backend": "cuda", "ops": " ".join(OPS)},
        small=True,
        results=str(Path(request.work) / f"sanitizer-{tool}.jsonl"),
        deadline=min(request.deadline - 4, time.time() + 60),
    )
    command = [sys.executable, "-m", "gpu_check.child", "gpu_check.correctness", inner.to_json()]
    code, output = _sanitize(program, tool, command, request, request.remaining() - 3)
    checks = [r for r in read_records(Path(inner.results)) if r["kind"] == "check"]
    name = f"compute-sanitizer {tool}"
    if code is None:
        recorder.skip(name, f"the time box is used up after {len(checks)} ops without an error")
        return
    summary = re.findall(r"ERROR SUMMARY: .*", output)
    recorder.check(
        name,
        code == 0 and bool(checks) and all(r["passed"] for r in checks),
        ops=len(checks),
        summary=summary[-1] if summary else "",
        error="" if code == 0 else _first_error(output),
    )


def _sanitize(
    program: str, tool: str, command: list[str], request: Request, seconds: float
) -> tuple[int | None, str]:
    """Run a command under a tool; returns its exit status, None when time was up, and output."""
    options = ["--tool", tool, "--error-exitcode", str(_ERROR_CODE), "--launch-timeout", "30"]
    try:
        done = subprocess.run(
            [program, *options, *command],
            cwd=request.work,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # an allocation a tensor
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return None, str(error.stdout or "")
    print(done.stdout[-6000:])
    return done.returncode, done.stdout


def _first_error(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines()]
    marks = ("error", "not supported", "failed", "invalid")
    return next((x[:300] for x in lines if any(m in x.lower() for m in marks)), output[-300:])
