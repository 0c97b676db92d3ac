"""Rotary position embedding of queries and keys, half-split as in Llama."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import check_tensor
from eapo_fast.kernels.kv_write import check_kv_write, kv_write
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    follow_torch_threads,
    triton_refusal,
)
from eapo_fast.kernels.rotary import reference

__all__ = ["rotary", "rotary_kv_write"]


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return `q` and `k` with entries i and i + R / 2 of every head turned; no gradient.

    Products are rounded to the wider dtype of `q` and `cos` before they are added, as torch does:
    in bfloat16 the result is torch's bit for bit.

    Args:
        q: [B, H, T, D] float32, bfloat16 or float64 (float16 too on a GPU); the last dimension is
            packed.
        k: [B, Hkv, T, D], likewise.
        cos, sin: [B or 1, T, R] contiguous, R even and at most D, in the dtype of `q` and `k` or
            float32; entries from R on are copied.
        backend: "auto" (cpu, triton on a GPU, else reference), "reference" (any device), "cpu" or
            "triton", which does both in one launch.

    The kernels return views whose memory is packed as [B, T, H, D]. Raises `ValueError` or
    `TypeError` that names the argument which does not fit.
    """
    q, k, cos, sin = q.detach(), k.detach(), cos.detach(), sin.detach()
    chosen = choose_backend(
        "rotary",
        backend,
        {"cpu": cpu_refusal, "triton": partial(triton_refusal, dtypes=GPU_STORAGE)},
        q,
    )
    if chosen == "triton":
        from eapo_fast.kernels.rotary import triton_kernel

        return triton_kernel.rotary(q, k, cos, sin)
    if chosen == "reference":
        return reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
    follow_torch_threads()
    return _rotary_cpu(q, cos, sin), _rotary_cpu(k, cos, sin)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return `q` turned as `rotary` does; write `k`, turned likewise, and `v` into their slots.

    In Triton this is one launch, with the bits of `rotary` and `kv_write` one after the other.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float64 (float16 too on a GPU), heads packed.
        k, v: [T, Hkv, D], likewise.
        cos, sin: [T, R] contiguous, as in `rotary`.
        k_cache, v_cache: [blocks, block_size, Hkv, D] contiguous, of that dtype; changed in place.
        slots: [T] int64, `block * block_size + offset`, no slot twice; negative: not written.
        backend: "auto" (triton on a GPU, else the other two ops), "reference" or "triton".

    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    q, k, v, cos, sin = (x.detach() for x in (q, k, v, cos, sin))
    refusals = {"triton": partial(triton_refusal, dtypes=GPU_STORAGE)}
    chosen = choose_backend("rotary_kv_write", backend, refusals, q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, [q.shape[0], "heads", q.shape[-1]], (q.dtype,), q.device)
    if chosen == "triton":
        from eapo_fast.kernels.rotary import triton_kernel

        check_kv_write(k, v, k_cache, v_cache, slots)
        return triton_kernel.rotary_kv_write(q, k, v, cos, sin, k_cache, v_cache, slots)
    heads = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    turned, keys = rotary(heads[0], heads[1], cos[None], sin[None], backend=backend)
    kv_write(keys[0].transpose(0, 1).contiguous(), v, k_cache, v_cache, slots, backend=backend)
    return turned[0].transpose(0, 1)


def _rotary_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    out = x.new_empty(batch, tokens, heads, width)
    _core.rotary(x, cos, sin, out)
    return out.transpose(1, 2)
