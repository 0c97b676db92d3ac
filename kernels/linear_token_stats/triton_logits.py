"""Entries of a row of logits as the kernels of the losses read them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent: an odd polynomial near 0, where the other form cancels."""
    size = tl.abs(x)
    square = x * x
    series = -0.00611316 * square + 0.02101005
    series = series * square - 0.05385406
    series = series * square + 0.13332794
    series = series * square - 0.33333329
    near = x + x * square * series
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit  # type: ignore[untyped-decorator]
def scaled(x, bias, column, there, inverse, cap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = cap(x + bias) / temperature; -inf where it is banned or past the end."""
    if BIAS:
        x += tl.load(bias + column, mask=there, other=0.0)
    if CAP:
        x = tl.where(x == float("-inf"), x, cap * _tanh(x / cap))
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
        x = tl.load(row + column, mask=there, other=0.0)
        y = scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
    return column, y
