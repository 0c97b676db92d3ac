"""The native CPU kernels: when they can run, and on how many threads."""

from __future__ import annotations

from functools import cache

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


@cache
def follow_torch_threads() -> None:
    """Use as many threads as torch does, once; `_core.set_num_threads` changes it later."""
    _core.set_num_threads(torch.get_num_threads())
