"""Writes to the KV cache in plain torch, on any device and for any dtype."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, Hkv, D] into their slots; negative slots are left out."""
    live = slots >= 0
    k_cache.flatten(0, 1)[slots[live]] = k[live]
    v_cache.flatten(0, 1)[slots[live]] = v[live]


def copy_blocks(caches: Sequence[Tensor], copies: Tensor) -> None:
    """Copy blocks of every cache by (source, target) pairs."""
    for cache in caches:
        source, target = copies.to(cache.device).long().unbind(-1)
        cache[target] = cache[source]
