"""Builds the CUDA kernels for the CPU, in the emulator of `cuda_emulator/`."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNELS = ("kv_write", "linear_token_stats", "paged_attention", "sample")
SOURCES = [
    EMULATOR / "module.cpp",
    *(ROOT / "kernels" / op / "kernel.cu" for op in KERNELS),
    *sorted((ROOT / "csrc/bindings").glob("bind_cuda_*.cpp")),
    ROOT / "csrc/bindings/tensor_view.cpp",
]
INCLUDES = [EMULATOR, ROOT / "csrc", ROOT / "kernels", ROOT / "csrc/third_party"]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-x", "c++"]


def compiler() -> str | None:
    """Return the C++ compiler to use, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def load(folder: Path) -> ModuleType:
    """Build the module in `folder` unless its sources are unchanged, and import it."""
    library = folder / f"{_fingerprint()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint() -> str:
    digest = hashlib.sha256(repr((sys.version, FLAGS)).encode())
    folders = (EMULATOR, *(ROOT / "kernels" / op for op in KERNELS), ROOT / "csrc/cuda")
    found = [path for folder in folders for path in folder.iterdir()]
    headers = [path for path in found if path.is_file() and path.suffix != ".py"]
    headers += [p for p in (ROOT / "csrc/bindings").iterdir() if p.is_file()]
    headers += [ROOT / "csrc/cpu" / name for name in ("policy.h", "token_program-inl.h")]
    for path in sorted({*SOURCES, *headers}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    assert cxx is not None
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    includes = [f"-I{path}" for path in (*INCLUDES, *headers)]

    def compile_one(source: Path) -> Path:
        target = library.parent / f"{library.stem}-{source.parent.name}-{source.stem}.o"
        command = [cxx, *includes, *FLAGS, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    partial = library.with_suffix(".partial")
    subprocess.run([cxx, "-shared", *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(library)
    for path in objects:
        path.unlink()
