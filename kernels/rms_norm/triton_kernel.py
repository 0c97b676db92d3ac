"""RMS norm in Triton, alone or with the sum before it: a row is read once and kept in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_fast.kernels.checks import check_tensor, rows_of
from eapo_fast.kernels.native import GPU_STORAGE
from eapo_fast.kernels.triton_functions import rounded

_ELEMENTS = 1024
"""Of a program; narrower rows share one."""

WIDEST = 8192
"""Entries of a row up to which its program keeps all of them; wider rows are read twice."""

TILE = 4096
"""Entries of a wider row at a time."""


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def norm(  # type: ignore[no-untyped-def]
    x,  # [rows, WIDTH], rows x_stride apart
    residual,  # likewise, where ADD
    weight,  # [WIDTH]
    total,  # [rows, WIDTH], where ADD
    out,  # [rows, WIDTH]
    x_stride,
    residual_stride,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= WIDTH
    ADD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    CAST: tl.constexpr,
):
    """Norms of ROWS rows. The order of the sum depends on WIDTH alone."""
    column = tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    live = (row < rows) & (column < WIDTH)
    value = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        other = tl.load(residual + row * residual_stride + column, mask=live, other=0.0)
        stored = rounded(value + other.to(tl.float32), total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, stored, mask=live)
        value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    normal = value * scale[:, None]
    if CAST:
        normal = rounded(normal, out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    tl.store(out + row * WIDTH + column, rounded(normal * factor, out.dtype.element_ty), mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def norm_wide(  # type: ignore[no-untyped-def]
    x,  # [rows, WIDTH], rows x_stride apart
    residual,
    weight,
    total,
    out,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    CAST: tl.constexpr,
):
    """Norm of one row in two passes of BLOCK entries at a time; arguments as in `norm`."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < WIDTH
        value = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
        if ADD:
            other = tl.load(residual + row * residual_stride + column, mask=live, other=0.0)
            stored = rounded(value + other.to(tl.float32), total.dtype.element_ty)
            tl.store(total + row * WIDTH + column, stored, mask=live)
            value = stored.to(tl.float32)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < WIDTH
        value = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
        if ADD:
            other = tl.load(residual + row * residual_stride + column, mask=live, other=0.0)
            value = rounded(value + other.to(tl.float32), total.dtype.element_ty).to(tl.float32)
        normal = value * scale
        if CAST:
            normal = rounded(normal, out.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            factor += 1.0
        tl.store(
            out + row * WIDTH + column, rounded(normal * factor, out.dtype.element_ty), mask=live
        )


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool,
    cast_before_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (x + residual, its norm), contiguous; without `residual` (x, its norm)."""
    dtype = x.dtype if residual is None else residual.dtype
    check_tensor("weight", weight, x.shape[-1:], (dtype,), x.device)
    if not weight.is_contiguous():
        raise ValueError(f"weight: got strides {weight.stride()}, it must be contiguous")
    rows, stride = rows_of("x", x, GPU_STORAGE)
    other, other_stride, total = x, stride, x
    if residual is not None:
        wide = (torch.float32,) if dtype == torch.float32 else (x.dtype,)
        check_tensor("residual", residual, x.shape, wide, x.device)
        other = residual
        _, other_stride = rows_of("residual", residual, GPU_STORAGE)
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[-1]
    if out.numel() == 0:
        return total, out
    block = triton.next_power_of_2(width) if width <= WIDEST else TILE
    options = {
        "WIDTH": width,
        "BLOCK": block,
        "ADD": residual is not None,
        "UNIT_OFFSET": unit_offset,
        "CAST": cast_before_weight,
    }
    tensors = (x, other, weight, total, out, stride, other_stride)
    if width > WIDEST:
        launch: Any = norm_wide[(rows,)]
        launch(*tensors, float(eps), **options, num_warps=16)
        return total, out
    together = max(1, _ELEMENTS // block)
    launch = norm[(triton.cdiv(rows, together),)]
    warps = min(16, max(4, block // 512))
    launch(*tensors, rows, float(eps), ROWS=together, **options, num_warps=warps)
    return total, out
