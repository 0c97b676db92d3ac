"""Rotary position embedding of queries and keys, half-split as in Llama."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    follow_torch_threads,
    triton_refusal,
)
from eapo_fast.kernels.rotary import reference

__all__ = ["rotary"]


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


def _rotary_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    out = x.new_empty(batch, tokens, heads, width)
    _core.rotary(x, cos, sin, out)
    return out.transpose(1, 2)
