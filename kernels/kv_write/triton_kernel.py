"""Writes to the KV cache in Triton: new keys and values, and whole blocks of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program."""


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def write(  # type: ignore[no-untyped-def]
    k,  # [tokens, WIDTH], rows k_stride apart
    v,
    k_cache,  # [slots, WIDTH]
    v_cache,
    slots,  # [tokens] int64
    k_stride,
    v_stride,
    tokens,
    WIDTH: tl.constexpr,  # kv_heads * D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    live = (slot >= 0)[:, None] & (column < WIDTH)[None, :]
    row = token.to(tl.int64)[:, None]
    key = tl.load(k + row * k_stride + column[None, :], mask=live, other=0)
    value = tl.load(v + row * v_stride + column[None, :], mask=live, other=0)
    target = slot[:, None] * WIDTH + column[None, :]
    tl.store(k_cache + target, key, mask=live)
    tl.store(v_cache + target, value, mask=live)


@triton.jit(do_not_specialize=["pairs"])  # type: ignore[untyped-decorator]
def copy(  # type: ignore[no-untyped-def]
    caches,  # [C] int64, addresses of [blocks, WIDTH] elements
    copies,  # [pairs, 2] int32 (source, target)
    pairs,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,  # type of an element; addresses are multiples of its size
):
    """Do all pairs, in their order, for BLOCK elements of the blocks of one cache.

    A block may be read by one pair and written by a later one, so pairs are not spread over
    programs; the barriers order them within one.
    """
    cache = tl.load(caches + tl.program_id(0)).to(tl.pointer_type(ELEMENT))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for pair in range(0, pairs):
        source = tl.load(copies + 2 * pair).to(tl.int64) * WIDTH
        target = tl.load(copies + 2 * pair + 1).to(tl.int64) * WIDTH
        found = tl.load(cache + source + column, mask=column < WIDTH, other=0)
        tl.debug_barrier()
        tl.store(cache + target + column, found, mask=column < WIDTH)
        tl.debug_barrier()


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, Hkv, D] into their slots; negative slots are left out."""
    tokens, width = k.shape[0], k.shape[1] * k.shape[2]
    if tokens == 0:
        return
    columns = min(triton.next_power_of_2(width), _BLOCK)
    rows = _BLOCK // columns
    launch: Any = write[(triton.cdiv(tokens, rows), triton.cdiv(width, columns))]
    launch(
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        v.stride(0),
        tokens,
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
    )


def copy_blocks(caches: Sequence[Tensor], copies: Tensor) -> None:
    """Copy blocks of every cache by (source, target) pairs, one launch for caches of one size."""
    sizes: dict[int, list[int]] = {}
    for cache in caches:
        sizes.setdefault(cache.nbytes // cache.shape[0], []).append(cache.data_ptr())
    for size, addresses in sizes.items():
        wide = size % 8 == 0 and all(address % 8 == 0 for address in addresses)
        width = size // 8 if wide else size
        block = min(triton.next_power_of_2(width), _BLOCK)
        launch: Any = copy[(len(addresses), triton.cdiv(width, block))]
        launch(
            _address_table(tuple(addresses), copies.device),
            copies,
            copies.shape[0],
            WIDTH=width,
            BLOCK=block,
            ELEMENT=tl.int64 if wide else tl.int8,
        )


@lru_cache(maxsize=16)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as int64 on the device; kept, since a graph must not capture their upload."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)
