"""The compiled kernels: when they can run, and on how many threads."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from eapo_fast import _core

STORAGE = (torch.float32, torch.bfloat16)
"""Floating-point types that the CPU kernels store; they compute in float32."""

GPU_STORAGE = (torch.float32, torch.bfloat16, torch.float16)
"""Floating-point types that the sampler's GPU kernels store; they compute in float32."""

Dtypes = tuple[torch.dtype, ...]


def cpu_refusal(tensor: Tensor) -> str | None:
    """Return why the CPU kernels cannot run on `tensor`, or None."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    if tensor.dtype not in STORAGE:
        return f"it stores float32 or bfloat16, got {tensor.dtype}"
    return None


def cuda_refusal(tensor: Tensor, dtypes: Dtypes = (torch.float32,)) -> str | None:
    """Return why the CUDA module's kernels cannot run on `tensor`, or None; no `dtypes`: any."""
    try:
        from eapo_fast import _cuda  # noqa: F401
    except ImportError:
        return "the CUDA module was not built (EAPO_FAST_CUDA=ON says what it misses)"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}"
    return _dtype_refusal(tensor, dtypes)


def triton_refusal(tensor: Tensor, dtypes: Dtypes = (torch.float32,)) -> str | None:
    """Return why Triton kernels cannot run on `tensor`, or None (also when interpreted)."""
    if not _has_triton():
        return "triton is not installed (pip install 'eapo_fast[gpu]')"
    if tensor.device.type != "cuda" and not triton_is_interpreted():
        return f"the tensors are on {tensor.device}"
    return _dtype_refusal(tensor, dtypes)


def triton_is_interpreted() -> bool:
    """Return whether Triton kernels run as plain Python: then the CPU's tensors will do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _dtype_refusal(tensor: Tensor, dtypes: Dtypes) -> str | None:
    if not dtypes or tensor.dtype in dtypes:
        return None
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"it takes {allowed}, got {tensor.dtype}"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def follow_torch_threads() -> None:
    """Use the threads that torch does, once; `_core.set_num_threads` changes their number later."""
    use_torch_threads()


def use_torch_threads() -> None:
    """Run the CPU kernels on as many threads as torch, and on the same ones where it has OpenMP."""
    _core.set_num_threads(torch.get_num_threads())
    _core.share_openmp(_gomp_parallel())


@cache
def _gomp_parallel() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch runs on, 0 without one.

    LLVM's and Intel's runtimes have that entry point too (on Linux).
    """
    libraries = Path(torch.__file__).parent / "lib"
    with suppress(OSError, AttributeError, ValueError):
        torch_cpu = ctypes.CDLL(str(libraries / "libtorch_cpu.so"), mode=os.RTLD_NOLOAD)
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    return 0
