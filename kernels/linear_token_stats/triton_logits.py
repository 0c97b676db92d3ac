"""Entries of a row of logits as the kernels of the losses read them."""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.triton_functions import tanh


@triton.jit  # type: ignore[untyped-decorator]
def scaled(x, bias, column, there, inverse, cap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = cap(x + bias) / temperature; -inf where it is banned or past the end."""
    if BIAS:
        x += tl.load(bias + column, mask=there, other=0.0)
    if CAP:
        x = tl.where(x == float("-inf"), x, cap * tanh(x / cap))
    return tl.where(there, x * inverse, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def entries(  # type: ignore[no-untyped-def]
    row, start, size, bias, inverse, cap, BIAS: tl.constexpr, CAP: tl.constexpr,
    RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns `start` ... `start + BLOCK - 1` and their y; RAW: the row holds y itself."""
    column = start + tl.arange(0, BLOCK)
    there = column < size
    if RAW:
        y = tl.load(row + column, mask=there, other=float("-inf"))
    else:
        x = tl.load(row + column, mask=there, other=0.0).to(tl.float32)
        y = scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
    return column, y
