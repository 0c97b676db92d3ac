"""Paged attention in CUDA: every query row on its own, in splits of 512 keys.

Made for decoding. Rows of a chunk are right too, but each reads its keys again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast import _cuda

SPLIT = 512
"""Keys whose partial result is made apart, from position 0 on."""


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    longest: tuple[int, int] | None,
) -> Tensor:
    """Return [T, Hq, D]; arguments as in the public function."""
    q, k, v = (x if x[:1].is_contiguous() else x.contiguous() for x in (q, k, v))
    _cuda.kv_write(k, v, k_cache, v_cache, slots)
    rows, heads, dim = q.shape
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    keys = int(kv_lens.max()) if longest is None else longest[1]
    splits = -(-keys // SPLIT)
    if window > 0:
        splits = min(splits, -(-window // SPLIT) + 1)
    shape = (rows, heads, max(splits, 1))
    acc, top, total = (
        torch.empty(size, dtype=torch.float32, device=q.device)
        for size in ((*shape, dim), shape, shape)
    )
    _cuda.attend_rows(
        q,
        k_cache,
        v_cache,
        cu_q,
        kv_lens,
        block_tables,
        scale,
        softcap,
        window,
        None if sinks is None else sinks.float(),
        SPLIT,
        acc,
        top,
        total,
        out,
    )
    return out
