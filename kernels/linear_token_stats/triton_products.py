"""Matrix products of an LM head over lists of rows whose length only the device knows.

A tile of rows behind the end of the list leaves at once, and sums over rows stop there: the time
goes with the rows that are in, and nobody waits for their number. Lists hold row numbers; products
gather and scatter by them, so that no row is moved. Sums run in a fixed order, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from eapo_fast.kernels.native import triton_is_interpreted
from eapo_fast.kernels.policy_loss.rows import listed

__all__ = ["grid", "listed", "logits", "settings", "to_hidden", "to_weight"]

BLOCK_ROWS, BLOCK_COLUMNS = 128, 128
"""Tile of a result; not tuned."""
BLOCK_INNER = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, total, WIDEN: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + total in float32, a rounded to the dtype of b; WIDEN: all of it in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def logits(  # type: ignore[no-untyped-def]
    hidden,  # [N, H]
    weight,  # [V, H]
    rows,  # list of rows of `hidden`
    span,  # [2] int64: where in the list the rows of this slab start and stop
    z,  # [C, V] fp32
    vocab,
    width,  # H
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = hidden[rows] @ weight.T."""
    first = tl.load(span)
    live = tl.load(span + 1) - first
    start = tl.program_id(0) * BLOCK_M
    if start >= live:
        return
    m = start + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows + first + m, mask=m < live, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for inner in range(0, width, BLOCK_K):
        k = inner + tl.arange(0, BLOCK_K)
        left = tl.load(
            hidden + row[:, None] * width + k[None, :],
            mask=(m < live)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + n[None, :].to(tl.int64) * width + k[:, None],
            mask=(n < vocab)[None, :] & (k < width)[:, None],
            other=0.0,
        )
        total = _dot(left, right, total, WIDEN, PRECISION)
    at = z + m[:, None].to(tl.int64) * vocab + n[None, :]
    tl.store(at, total, mask=(m < live)[:, None] & (n < vocab)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def to_hidden(  # type: ignore[no-untyped-def]
    z,  # [C, V] fp32, logit gradients
    weight,
    rows,
    span,
    active,  # list of rows of the slab, [C]
    count,  # [1] int64, rows in `active`
    out,  # [N, H] fp32
    vocab,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[rows[active]] = z[active] @ weight."""
    live = tl.load(count)
    start = tl.program_id(0) * BLOCK_M
    if start >= live:
        return
    m = start + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(active + m, mask=m < live, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for inner in range(0, vocab, BLOCK_K):
        k = inner + tl.arange(0, BLOCK_K)
        left = tl.load(
            z + row[:, None] * vocab + k[None, :],
            mask=(m < live)[:, None] & (k < vocab)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + k[:, None].to(tl.int64) * width + n[None, :],
            mask=(k < vocab)[:, None] & (n < width)[None, :],
            other=0.0,
        )
        total = _dot(left, right, total, WIDEN, PRECISION)
    to = tl.load(rows + tl.load(span) + row, mask=m < live, other=0)
    tl.store(
        out + to[:, None] * width + n[None, :],
        total,
        mask=(m < live)[:, None] & (n < width)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def to_weight(  # type: ignore[no-untyped-def]
    z,
    hidden,
    rows,
    span,
    active,
    count,
    out,  # [V, H] fp32
    bias,  # [V] fp32
    vocab,
    width,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out += z[active].T @ hidden[rows[active]]; bias += sum of z[active]."""
    live = tl.load(count)
    if live == 0:
        return
    first = tl.load(span)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = out + m[:, None].to(tl.int64) * width + n[None, :]
    inside = (m < vocab)[:, None] & (n < width)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if WEIGHT:
        total = tl.load(at, mask=inside, other=0.0)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for inner in range(0, live, BLOCK_K):
        k = inner + tl.arange(0, BLOCK_K)
        row = tl.load(active + k, mask=k < live, other=0)
        left = tl.load(
            z + row[None, :] * vocab + m[:, None],
            mask=(k < live)[None, :] & (m < vocab)[:, None],
            other=0.0,
        )
        if BIAS:
            sums += tl.sum(left, 1)
        if WEIGHT:
            source = tl.load(rows + first + row, mask=k < live, other=0)
            right = tl.load(
                hidden + source[:, None] * width + n[None, :],
                mask=(k < live)[:, None] & (n < width)[None, :],
                other=0.0,
            )
            total = _dot(left, right, total, WIDEN, PRECISION)
    if WEIGHT:
        tl.store(at, total, mask=inside)
    if BIAS and tl.program_id(1) == 0:
        before = tl.load(bias + m, mask=m < vocab, other=0.0)
        tl.store(bias + m, before + sums, mask=m < vocab)


def settings(dtype: torch.dtype, *, gradient: bool) -> dict[str, Any]:
    """Return the constants of a product of numbers of `dtype`.

    float32 is multiplied exactly unless `torch.set_float32_matmul_precision` allows TF32. Gradients
    of float16 heads are too small for float16 and are multiplied as TF32.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    small = gradient and dtype == torch.float16
    return {
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_N": BLOCK_COLUMNS,
        "BLOCK_K": 32 if small else BLOCK_INNER[dtype],
        "WIDEN": triton_is_interpreted() or small,
        "PRECISION": "tf32" if small or (dtype == torch.float32 and not exact) else "ieee",
        "num_warps": 8,
        "num_stages": 3,
    }


def grid(rows: int, columns: int) -> tuple[int, int]:
    """Return the tiles of a result."""
    return triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS)
