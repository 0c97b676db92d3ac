"""The product in the middle of a gated MLP in Triton: one launch, every entry read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_fast.kernels.checks import check_tensor, rows_of
from eapo_fast.kernels.native import GPU_STORAGE
from eapo_fast.kernels.triton_functions import rounded

_BLOCK = 1024
"""Elements of a program."""


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def activate(  # type: ignore[no-untyped-def]
    gate,  # [rows, WIDTH], rows gate_stride apart
    up,  # likewise
    out,  # [rows, WIDTH]
    gate_stride,
    up_stride,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
):
    """`activation(gate) * up`; x / 2 * (1 + tanh(y)) is x * sigmoid(2 y), which does not cancel."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    live = (row < rows) & (column < WIDTH)
    x = tl.load(gate + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    y = x
    if GELU:
        y = (x + x * x * x * 0.044715) * 1.5957691216057308  # 2 sqrt(2 / pi)
    small = tl.exp(-tl.abs(y))
    activated = x * (tl.where(y < 0.0, small, 1.0) / (1.0 + small))
    factor = tl.load(up + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    product = rounded(activated, out.dtype.element_ty).to(tl.float32) * factor
    tl.store(out + row * WIDTH + column, rounded(product, out.dtype.element_ty), mask=live)


def gated_activation(gate: Tensor, up: Tensor, *, kind: str) -> Tensor:
    """Return `activation(gate) * up`, contiguous; arguments as in the public function."""
    rows, gate_stride = rows_of("gate", gate, GPU_STORAGE)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate.device)
    _, up_stride = rows_of("up", up, GPU_STORAGE)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    if out.numel() == 0:
        return out
    columns = min(triton.next_power_of_2(width), _BLOCK)
    together = _BLOCK // columns
    launch: Any = activate[(triton.cdiv(rows, together), triton.cdiv(width, columns))]
    launch(
        gate,
        up,
        out,
        gate_stride,
        up_stride,
        rows,
        WIDTH=width,
        ROWS=together,
        COLUMNS=columns,
        GELU=kind == "gelu_tanh",
        num_warps=4,
    )
    return out
