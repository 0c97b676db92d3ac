"""Writes to the paged KV cache: new keys and values, copies of whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import check_tensor
from eapo_fast.kernels.kv_write import reference
from eapo_fast.kernels.native import cpu_refusal, cuda_refusal, triton_refusal

__all__ = ["copy_blocks", "kv_write"]


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write the keys and values of T tokens into their slots; a negative slot writes nothing.

    Args:
        k, v: [T, Hkv, D], each token's values packed; any dtype.
        k_cache, v_cache: [blocks, block_size, Hkv, D] contiguous, of that dtype.
        slots: [T] int64, `block * block_size + offset`, no slot twice.
        backend: "auto" (triton on a GPU, else reference), "reference", "triton" or "cuda" (when it
            is named).

    Raises `ValueError` for shapes, dtypes or devices that do not fit, and for a backend that cannot
    run here; slots past the cache are not looked for on a GPU.
    """
    check_kv_write(k, v, k_cache, v_cache, slots)
    chosen = choose_backend(
        "kv_write",
        backend,
        {"triton": partial(triton_refusal, dtypes=())},
        k_cache,
        on_request={"cuda": partial(cuda_refusal, dtypes=())},
    )
    if chosen == "triton":
        from eapo_fast.kernels.kv_write import triton_kernel

        triton_kernel.kv_write(k, v, k_cache, v_cache, slots)
    elif chosen == "cuda":
        from eapo_fast import _cuda

        _cuda.kv_write(k, v, k_cache, v_cache, slots)
    else:
        reference.kv_write(k, v, k_cache, v_cache, slots)


def copy_blocks(
    caches: Tensor | Sequence[Tensor], copies: Tensor, *, backend: str = "auto"
) -> None:
    """Copy whole blocks inside every cache [blocks, ...] by `copies` [C, 2] (source, target).

    Args:
        caches: one cache or a sequence of them, contiguous, of any dtype and equal numbers of
            blocks; on a GPU all of them take one launch (one for each size of block).
        copies: [C, 2] int32 on the caches' device.
        backend: "auto" (cpu for float32 and bfloat16, triton on a GPU, else reference),
            "reference", "cpu", "triton" or "cuda" (when it is named).

    Every source is read as it was before the call, so no block may be the target of two pairs, nor
    a source after it was a target; the CPU kernel raises `ValueError` then.
    """
    listed = [caches] if isinstance(caches, Tensor) else list(caches)
    if not listed or copies.shape[0] == 0:
        return
    chosen = choose_backend(
        "copy_blocks",
        backend,
        {"cpu": cpu_refusal, "triton": partial(triton_refusal, dtypes=())},
        listed[0],
        on_request={"cuda": partial(cuda_refusal, dtypes=())},
    )
    if chosen == "cpu":
        for cache in listed:
            _core.copy_blocks(cache, copies)
        return
    _check_caches(listed, copies)
    if chosen == "triton":
        from eapo_fast.kernels.kv_write import triton_kernel

        triton_kernel.copy_blocks(listed, copies)
    elif chosen == "cuda":
        from eapo_fast import _cuda

        _cuda.copy_blocks(listed, copies)
    else:
        reference.copy_blocks(listed, copies)


def check_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Raise `ValueError` for shapes, dtypes or devices that do not fit; values are not read."""
    dtype, device = (k_cache.dtype,), k_cache.device
    check_tensor("k_cache", k_cache, ["blocks", "block_size", "Hkv", "D"], dtype)
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, device)
    check_tensor("slots", slots, ["T"], (torch.int64,), device)
    for name, new in (("k", k), ("v", v)):
        check_tensor(name, new, (slots.shape[0], *k_cache.shape[2:]), dtype, device)
        if not new[:1].is_contiguous():
            raise ValueError(f"{name}: got strides {new.stride()}, packed tokens are needed")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        if not cache.is_contiguous():
            raise ValueError(f"{name}: got strides {cache.stride()}, it must be contiguous")


def _check_caches(caches: Sequence[Tensor], copies: Tensor) -> None:
    check_tensor("copies", copies, ["C", 2], (torch.int32,), caches[0].device)
    for i, cache in enumerate(caches):
        if cache.device != copies.device or not cache.is_contiguous():
            raise ValueError(
                f"caches[{i}]: got strides {cache.stride()} on {cache.device}, "
                f"a contiguous cache on {copies.device} is needed"
            )
