"""Stage 1: the package built as a user builds it, into a folder of this run.

First without CUDA, so that the stages after have something to run whatever nvcc does; then with
the CUDA kernels, for this GPU's architecture, which then takes the first one's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from gpu_check.environment import find_tool
from gpu_check.records import Recorder, Request

_INTERPRETER = (sys.executable,)
"""What imports the build; with the site packages, where an editable install may stand before it."""


def run(request: Request, recorder: Recorder) -> None:
    """Build into `work/site`, and with CUDA into `work/site-cuda`."""
    tools = [find_tool(name) for name in ("cmake", "ninja", "nvcc")]
    folders = [str(Path(tool).parent) for tool in tools if tool]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    modes = ["OFF"] if request.device == "cpu" or tools[2] is None else ["OFF", "ON"]
    for mode in modes:
        target = Path(request.work) / ("site-cuda" if mode == "ON" else "site")
        with recorder.guard(f"build, CUDA {mode}"):
            seconds = _install(request, target, mode, path)
            recorder.figure(f"build, CUDA {mode}", round(seconds, 1), "s")
            _import(target, mode == "ON", recorder)
    if modes == ["OFF"] and request.device == "cuda":
        recorder.skip("CUDA kernels", "no nvcc: the package was built without them")


def site_of(work: Path) -> Path | None:
    """Return the folder of the best build that a run has, if any."""
    for name in ("site-cuda", "site"):
        if (work / name / ".complete").exists():
            return work / name
    return None


def architecture(capability: tuple[int, int]) -> str:
    """Return what CMake calls the native code of a compute capability."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def _install(request: Request, target: Path, mode: str, path: str) -> float:
    # The second build finds the objects of the first.
    settings = [f"build-dir={request.work}/build", *_pybind11()]
    if mode == "ON":
        import torch

        native = architecture(torch.cuda.get_device_capability())
        settings.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={native}")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--no-compile", "--target", str(target)]
    command += [part for setting in settings for part in ("-C", setting)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "."],
        cwd=request.root,
        env={**os.environ, "PATH": path, "EAPO_FAST_CUDA": mode},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout[-8000:])
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise RuntimeError(f"pip ended with {done.returncode}: {' | '.join(errors[:4])}")
    return time.perf_counter() - start


def _pybind11() -> list[str]:
    """Return where CMake finds pybind11, also where it lies outside the site packages."""
    if find_spec("pybind11") is None:
        return []
    import pybind11

    return [f"cmake.define.pybind11_DIR={pybind11.get_cmake_dir()}"]


def _import(target: Path, with_cuda: bool, recorder: Recorder) -> None:
    """Import what was built in a fresh interpreter."""
    code = "import eapo_fast; print(eapo_fast.__file__)"
    if with_cuda:
        code += "; import eapo_fast._cuda"
    paths = [str(target), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [*_INTERPRETER, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )
    ours = done.returncode == 0 and done.stdout.startswith(str(target))
    if ours:
        (target / ".complete").touch()
    recorder.check(
        f"import of the build{' with CUDA' if with_cuda else ''}",
        ours,
        hint="" if ours else "an editable install stands before PYTHONPATH: take --no-build",
        output=(done.stdout + done.stderr)[-600:],
    )
