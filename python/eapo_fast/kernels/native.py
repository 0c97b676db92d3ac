"""The compiled kernels: when they can run, and on how many threads."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

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
    """Use as many threads as torch does, once; `_core.set_num_threads` changes it later."""
    _core.set_num_threads(torch.get_num_threads())
