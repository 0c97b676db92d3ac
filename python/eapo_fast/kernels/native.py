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


def cpu_refusal(tensor: Tensor) -> str | None:
    """Return why the CPU kernels cannot run on `tensor`, or None."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    if tensor.dtype not in STORAGE:
        return f"it stores float32 or bfloat16, got {tensor.dtype}"
    return None


def cuda_refusal(tensor: Tensor) -> str | None:
    """Return why the CUDA module's kernels cannot run on `tensor`, or None."""
    try:
        from eapo_fast import _cuda  # noqa: F401
    except ImportError:
        return "the CUDA module was not built (EAPO_FAST_CUDA=ON says what it misses)"
    return _gpu_refusal(tensor)


def triton_refusal(tensor: Tensor) -> str | None:
    """Return why Triton kernels cannot run on `tensor`, or None (also when interpreted)."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'eapo_fast[gpu]')"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else _gpu_refusal(tensor)


def _gpu_refusal(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}"
    return None if tensor.dtype == torch.float32 else f"it takes float32, got {tensor.dtype}"


@cache
def follow_torch_threads() -> None:
    """Use as many threads as torch does, once; `_core.set_num_threads` changes it later."""
    _core.set_num_threads(torch.get_num_threads())
