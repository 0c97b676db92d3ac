"""Stage 0: what is here, and what is missing for which stage."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check.records import Recorder, Request

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "jinja2": "jinja2",
    "httpx": "httpx",
    "yaml": "pyyaml",
    "sympy": "sympy",
    "flint": "python-flint",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "pytest": "pytest",
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
    "pynvml": "nvidia-ml-py",
}
"""Module and package of everything that some stage uses."""

TOOLS = ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer", "cuobjdump", "nvidia-smi")
"""Programs that some stage uses."""


def run(request: Request, recorder: Recorder) -> None:
    """Write down hardware, versions and tools."""
    modules = {name: find_spec(name) is not None for name in PACKAGES}
    tools = {name: find_tool(name) for name in TOOLS}
    recorder.note(
        "environment",
        modules=modules,
        versions={p: _version(p) for m, p in PACKAGES.items() if modules[m]},
        tools=tools,
        nvcc=_first_line(tools["nvcc"], "--version", -1),
        **machine(),
    )
    for module, package in PACKAGES.items():
        if not modules[module]:
            recorder.skip(package, "not installed")
    for name, path in tools.items():
        if path is None:
            recorder.skip(name, "not found")
    if modules["torch"]:  # last: a first import from a cold disk may take longer than the box
        recorder.note("torch", **seen_by_torch())


def machine() -> dict[str, Any]:
    """Return CPU, GPU and driver as far as they can be read without torch."""
    smi = shutil.which("nvidia-smi")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _first_line(smi, "--query-gpu=name --format=csv,noheader", 0),
        "driver": _first_line(smi, "--query-gpu=driver_version --format=csv,noheader", 0),
    }


def seen_by_torch() -> dict[str, Any]:
    """Return torch's version and the GPU that it can use, if there is one."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu": "",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def find_tool(name: str) -> str | None:
    """Return the path of a program: on the PATH, beside Python, or in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    places = (None, str(Path(sys.executable).parent), str(toolkit))
    return next((path for place in places if (path := shutil.which(name, path=place))), None)


def commit_of(root: Path, given: str | None) -> str:
    """Return the commit: as given, from the file COMMIT, or from git; "unknown" without all."""
    if given:
        return given
    stamp = root / "COMMIT"
    if stamp.is_file() and stamp.read_text().split():
        return stamp.read_text().split()[0]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    line = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return line.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _first_line(program: str | None, arguments: str, which: int) -> str:
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments.split()], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[which].strip() if lines else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
