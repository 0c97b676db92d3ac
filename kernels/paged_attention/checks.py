"""Argument checks of paged attention on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.checks import check_tensor
from eapo_fast.kernels.native import GPU_STORAGE

_MAX_DIM = 256


def check_arguments(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    sinks: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise `ValueError` for shapes, dtypes and devices that do not fit; values are not read."""
    tokens, heads, dim = q.shape
    device, dtype = q.device, (q.dtype,)
    check_tensor("q", q, ["T", "Hq", "D"], GPU_STORAGE)
    check_tensor("k_cache", k_cache, ["blocks", "block_size", "Hkv", dim], dtype, device)
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, device)
    kv_heads = k_cache.shape[2]
    if dim > _MAX_DIM or heads % max(kv_heads, 1) != 0:
        raise ValueError(
            f"q: got {heads} heads of {dim}, allowed is a multiple of the {kv_heads} heads of "
            f"k_cache, of at most {_MAX_DIM}"
        )
    for name, new in (("k", k), ("v", v)):
        if new is None:  # in the cache already
            continue
        check_tensor(name, new, (tokens, kv_heads, dim), dtype, device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name}: got strides {cache.stride()}, it must be contiguous")
    segments = kv_lens.shape[0]
    integers = (torch.int32,)
    check_tensor("slots", slots, [tokens], (torch.int64,), device)
    check_tensor("kv_lens", kv_lens, ["S"], integers, device)
    check_tensor("cu_q", cu_q, [segments + 1], integers, device)
    check_tensor("block_tables", block_tables, [segments, "B"], integers, device)
    if sinks is not None:
        check_tensor("sinks", sinks, [heads], (q.dtype, torch.float32), device)
    if shared is not None:
        check_tensor("shared[1]", shared[1], ["P"], integers, device)
        check_tensor("shared[0]", shared[0], [shared[1].shape[0], 2], integers, device)
