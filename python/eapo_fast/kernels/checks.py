"""Argument checks that several ops share: shapes, dtypes, devices, packed sequences.

Values are looked at only on the CPU, so that no check makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
FLAGS = (torch.bool, torch.uint8, torch.int64, torch.int32, *FLOATS)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def may_look(tensor: Tensor) -> bool:
    """Return whether values of a tensor can be had without waiting for a device."""
    return tensor.device.type == "cpu"


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise `ValueError` unless `tensor` fits; a letter in `shape` stands for any size."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, a torch tensor is needed")
    sizes_fit = len(tensor.shape) == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not sizes_fit:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, allowed is [{wanted}]")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: got {tensor.dtype}, allowed is {allowed}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, the other arguments are on {device}")


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Raise `ValueError` unless `cu_seqlens` [S+1] cuts `rows` rows: 0 = c_0 <= ... <= c_S."""
    check_tensor("cu_seqlens", cu_seqlens, ["S+1"], INTEGERS, device)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: got no entries; S sequences need S + 1, from 0 to N")
    if device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        raise ValueError(f"cu_seqlens: runs from {first} to {last}, must run from 0 to N = {rows}")
    if bool((cu_seqlens.diff() < 0).any()):
        at = int((cu_seqlens.diff() < 0).nonzero()[0])
        raise ValueError(f"cu_seqlens: falls from entry {at} to {at + 1}; it must never fall")


def check_range(name: str, values: Tensor, stop: int) -> None:
    """Raise `ValueError` unless integer `values` lie in [0, stop)."""
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= stop:
        raise ValueError(f"{name}: got values from {low} to {high}, allowed is 0 to {stop - 1}")
