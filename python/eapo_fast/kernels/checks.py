"""Argument checks that several ops share: shapes, dtypes, devices, packed sequences.

Values are looked at only on the CPU, so that no check makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
FLAGS = (torch.bool, torch.uint8, torch.int64, torch.int32, *FLOATS)
_TINY, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


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


def rows_of(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
    """Return how many rows [..., n] holds and their distance in elements.

    Raises `ValueError` unless the dtype is one of `dtypes`, entries of a row lie side by side, and
    rows at one distance.
    """
    check_tensor(name, tensor, [*map(str, range(tensor.ndim - 1)), "n"], dtypes)
    width = tensor.shape[-1]
    count, stride = 1, width
    fits = width <= 1 or tensor.stride(-1) == 1
    for size, step in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        stride = step if count == 1 else stride
        fits = fits and step == stride * count
        count *= size
    if not fits and tensor.numel() > 0:
        raise ValueError(
            f"{name}: want rows at one distance (call .contiguous()), got shape "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}"
        )
    return count, stride


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


def check_positive(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise `ValueError` unless `value` is a number above 0 that float32 holds; or None."""
    if value is None and optional:
        return
    number = hasattr(value, "__float__")  # of Python, of numpy, or a tensor with one
    if not number or not _TINY <= value <= _MOST:
        more = ", or None" if optional else ""
        raise ValueError(f"{name}: got {value!r}, allowed is a finite number above 0{more}")


def check_integer(name: str, value: Any, allowed: str, low: int, high: int | None = None) -> None:
    """Raise `ValueError` unless `value` is an integer from `low` to `high`; `allowed` says so."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value!r}, allowed is {allowed}")


def check_total(name: str, given: Any) -> None:
    """Raise `ValueError` unless `given` is None, a number of 0 or more, or a tensor with one."""
    if given is None:
        return
    value = given
    if isinstance(given, Tensor):
        if given.ndim:
            raise ValueError(f"{name}: got shape {list(given.shape)}, allowed is [], one number")
        if torch.compiler.is_compiling() or type(given) is not Tensor or not may_look(given):
            return
        value = given.item()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: got {given!r}, allowed is a number of 0 or more, or None")


def refuse_transforms(name: str, tensor: Any) -> None:
    """Raise `ValueError` for a tensor inside of a transform of torch.func."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(
            f"{name}: got a tensor of a torch.func transform (grad, vmap, jvp, ...), which this op "
            "does not support; call it outside, and use torch.autograd for gradients"
        )
