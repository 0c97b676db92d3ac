"""Rotary position embedding in Triton: queries and keys in one launch, a token a program.

`rotate_write` puts the turned keys, and the values, into the paged cache instead of new memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_fast.kernels.checks import check_tensor
from eapo_fast.kernels.native import GPU_STORAGE
from eapo_fast.kernels.triton_functions import rounded

_ELEMENTS = 1024
"""Pairs of a program."""


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    x,  # heads of one token, x_head apart
    out,  # the same heads, side by side
    x_head,
    cos,  # [2 * HALF], of the token
    sin,
    head,  # [TILE] int32
    heads,  # those from here on are left out
    D: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
    ROUND: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    source = x + head.to(tl.int64)[:, None] * x_head
    target = out + head[:, None] * D
    there = (head < heads)[:, None]
    if HALF > 0:
        column = tl.arange(0, COLUMNS)[None, :]
        inside = column < HALF
        live = there & inside
        cos_a = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + HALF + column, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + HALF + column, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(source + column, mask=live, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + column, mask=live, other=0.0).to(tl.float32)
        a_cos, b_sin, b_cos, a_sin = a * cos_a, b * sin_a, b * cos_b, a * sin_b
        if ROUND:
            a_cos = rounded(a_cos, dtype).to(tl.float32)
            b_sin = rounded(b_sin, dtype).to(tl.float32)
            b_cos = rounded(b_cos, dtype).to(tl.float32)
            a_sin = rounded(a_sin, dtype).to(tl.float32)
        tl.store(target + column, rounded(a_cos - b_sin, dtype), mask=live)
        tl.store(target + HALF + column, rounded(b_cos + a_sin, dtype), mask=live)
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        live = there & (column < D)
        tl.store(target + column, tl.load(source + column, mask=live, other=0.0), mask=live)


@triton.jit(do_not_specialize=["tokens", "angle_batch"])  # type: ignore[untyped-decorator]
def rotate(  # type: ignore[no-untyped-def]
    q,  # [B, Q_HEADS, tokens, D]
    k,  # [B, K_HEADS, tokens, D]
    cos,  # [B or 1, tokens, 2 * HALF]
    sin,
    q_out,  # [B, tokens, Q_HEADS, D]
    k_out,  # [B, tokens, K_HEADS, D]
    q_batch,  # strides
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    tokens,
    angle_batch,  # rows of angles from one batch row to the next: tokens or 0
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,  # >= HALF
    REST: tl.constexpr,  # >= D - 2 * HALF
    ROUND: tl.constexpr,  # products to the dtype of q
):
    """Turn Q_TILE query heads of one token, or K_TILE key heads in the programs behind those."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row - batch * tokens
    angle = (batch * angle_batch + token) * (2 * HALF)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (Q_HEADS + Q_TILE - 1) // Q_TILE
    if tile < q_tiles:
        _turn(
            q + batch * q_batch + token * q_token,
            q_out + row * (Q_HEADS * D),
            q_head,
            cos + angle,
            sin + angle,
            tile * Q_TILE + tl.arange(0, Q_TILE),
            Q_HEADS,
            D,
            HALF,
            COLUMNS,
            REST,
            ROUND,
        )
    else:
        _turn(
            k + batch * k_batch + token * k_token,
            k_out + row * (K_HEADS * D),
            k_head,
            cos + angle,
            sin + angle,
            (tile - q_tiles) * K_TILE + tl.arange(0, K_TILE),
            K_HEADS,
            D,
            HALF,
            COLUMNS,
            REST,
            ROUND,
        )


@triton.jit  # type: ignore[untyped-decorator]
def rotate_write(  # type: ignore[no-untyped-def]
    q,  # [tokens, Q_HEADS, D]
    k,  # [tokens, K_HEADS, D]
    v,  # likewise
    cos,  # [tokens, 2 * HALF]
    sin,
    slots,  # [tokens] int64
    q_out,  # [tokens, Q_HEADS, D]
    k_cache,  # [slots, K_HEADS, D]
    v_cache,
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # >= D
    HALF: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
    ROUND: tl.constexpr,
):
    """As `rotate`; the programs of key heads write these and their values where the slot says."""
    token = tl.program_id(0).to(tl.int64)
    angle = token * (2 * HALF)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (Q_HEADS + Q_TILE - 1) // Q_TILE
    if tile < q_tiles:
        _turn(
            q + token * q_token,
            q_out + token * (Q_HEADS * D),
            q_head,
            cos + angle,
            sin + angle,
            tile * Q_TILE + tl.arange(0, Q_TILE),
            Q_HEADS,
            D,
            HALF,
            COLUMNS,
            REST,
            ROUND,
        )
    else:
        slot = tl.load(slots + token)
        target = tl.maximum(slot, 0) * (K_HEADS * D)
        head = (tile - q_tiles) * K_TILE + tl.arange(0, K_TILE)
        heads = tl.where(slot >= 0, K_HEADS, 0)
        _turn(
            k + token * k_token,
            k_cache + target,
            k_head,
            cos + angle,
            sin + angle,
            head,
            heads,
            D,
            HALF,
            COLUMNS,
            REST,
            ROUND,
        )
        column = tl.arange(0, WIDTH)[None, :]
        live = (head < heads)[:, None] & (column < D)
        source = v + token * v_token + head.to(tl.int64)[:, None] * v_head
        value = tl.load(source + column, mask=live, other=0.0)
        tl.store(v_cache + target + head[:, None] * D + column, value, mask=live)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return both turned, as views of memory packed as [B, T, H, D]."""
    _check(q, k, cos, sin)
    batches, q_heads, tokens, dim = q.shape
    k_heads = k.shape[1]
    q_out, k_out = (
        torch.empty(batches, tokens, heads, dim, dtype=q.dtype, device=q.device)
        for heads in (q_heads, k_heads)
    )
    if q_out.numel() + k_out.numel() > 0:
        tiles, constants = _plan(q, q_heads, k_heads, cos)
        launch: Any = rotate[(batches * tokens, tiles)]
        launch(
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *_strides(q),
            *_strides(k),
            tokens,
            tokens if cos.shape[0] > 1 else 0,
            **constants,
        )
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return the turned queries, packed; shapes as in the public function."""
    _check(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    tokens, q_heads, dim = q.shape
    k_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    tiles, constants = _plan(q, q_heads, k_heads, cos)
    launch: Any = rotate_write[(tokens, tiles)]
    launch(
        q,
        k,
        v,
        cos,
        sin,
        slots,
        out,
        k_cache,
        v_cache,
        *(x.stride(i) if x.shape[i] > 1 else 0 for x in (q, k, v) for i in (0, 1)),
        WIDTH=triton.next_power_of_2(dim),
        **constants,
    )
    return out


def _plan(q: Tensor, q_heads: int, k_heads: int, cos: Tensor) -> tuple[int, dict[str, Any]]:
    """How many programs a token has, and what they are compiled for."""
    dim, half = q.shape[-1], cos.shape[-1] // 2
    columns = triton.next_power_of_2(max(1, half))
    most = max(1, _ELEMENTS // columns)
    q_tile, k_tile = (min(triton.next_power_of_2(max(1, n)), most) for n in (q_heads, k_heads))
    rest = dim - 2 * half
    constants = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "D": dim,
        "HALF": half,
        "Q_TILE": q_tile,
        "K_TILE": k_tile,
        "COLUMNS": columns,
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "ROUND": cos.dtype == q.dtype and q.dtype != torch.float32,
        "num_warps": 4 if q_tile * columns > 512 else 2,
        "enable_fp_fusion": False,  # each product is rounded before the sum, as in torch
    }
    return triton.cdiv(q_heads, q_tile) + triton.cdiv(k_heads, k_tile), constants


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Distances of batch rows, heads and tokens; 0 where there is one, whatever torch says."""
    strides = [x.stride(i) if x.shape[i] > 1 else 0 for i in range(3)]
    return strides[0], strides[1], strides[2]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise `ValueError` for shapes, dtypes and devices that do not fit; values are not read."""
    device, dtype = q.device, (q.dtype,)
    check_tensor("q", q, ["B", "H", "T", "D"], GPU_STORAGE)
    batches, _, tokens, dim = q.shape
    check_tensor("k", k, [batches, "Hkv", tokens, dim], dtype, device)
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 and dim > 1:
            raise ValueError(f"{name}: got strides {x.stride()}, the last must be 1")
    check_tensor("cos", cos, ["B", tokens, "R"], (q.dtype, torch.float32), device)
    check_tensor("sin", sin, cos.shape, (cos.dtype,), device)
    if cos.shape[0] not in (1, batches):
        raise ValueError(f"cos: want {batches} or 1 in the first dimension, got {cos.shape[0]}")
    if cos.shape[2] % 2 or cos.shape[2] > dim:
        raise ValueError(f"cos: want an even last dimension of at most {dim}, got {cos.shape[2]}")
    for name, x in (("cos", cos), ("sin", sin)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()}, it must be contiguous")
