"""Causal attention over a paged KV cache, with the write of the new keys and values fused in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.kv_write import copy_blocks
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    cuda_refusal,
    follow_torch_threads,
    triton_refusal,
)
from eapo_fast.kernels.paged_attention import flash, reference
from eapo_fast.kernels.rotary import rotary, rotary_kv_write

__all__ = ["copy_blocks", "paged_attention"]


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write `k`, `v` into the cache, then attend; returns [T, Hq, D] in the dtype of `q`.

    S segments are packed along T. The rows of segment s are the last `q_len` of its `kv_lens[s]`
    positions; the row at position p sees keys `max(0, p - window + 1) .. p`. Query head h reads key
    head `h // (Hq / Hkv)`. On the CPU the bits of a row do not depend on batch, chunking, block
    size, threads or `shared`. Rows of padding (slot -1) write nothing; a segment without keys gets
    zeros.

    Args:
        q: [T, Hq, D] float32 or bfloat16 (float16 too on a GPU, any for the reference).
        k, v: [T, Hkv, D], Hq a multiple of Hkv.
        k_cache, v_cache: [blocks, block_size, Hkv, D] contiguous; changed in place at `slots`.
        slots: [T] int64, `block * block_size + offset` of each token; negative: not written.
        cu_q: [S + 1] int32, borders of the segments from 0 to T.
        kv_lens: [S] int32, keys of each segment, this call's included.
        block_tables: [S, B] int32, blocks of each segment; entries past its keys are not read.
        scale: factor on q . k.
        softcap: scores become `softcap * tanh(score / softcap)`; 0: off.
        window: keys that a row sees, itself included; 0: all.
        sinks: [Hq] in the dtype of `q` or float32; a logit of each head that joins the softmax and
            has no value.
        angles: (cos, sin) [T, R], by which `q` and `k` are turned first, as `rotary` does; on a GPU
            in the launch that writes the cache.
        shared: (spans [P, 2] int32: first segment and number of segments; lens [P] int32). The
            segments of a span have one query row each and begin with the same `lens` tokens, a
            multiple of the block size, in the same blocks. Speed only: they are read once. Spans
            without segments at the end are padding.
        longest: most query rows and most keys of a segment; spares a GPU the wait for their values.
        backend: "auto" (cpu; on a GPU flash-attn's kernels where they fit, else triton; else
            reference), "reference" (any device), "cpu", "flash", "triton" or "cuda" (when named).
            Triton on the CPU is the interpreter.

    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    flash_refusal = partial(flash.flash_refusal, k_cache=k_cache, sinks=sinks)
    chosen = choose_backend(
        "paged_attention",
        backend,
        {"cpu": cpu_refusal, "flash": flash_refusal, "triton": _triton_refusal},
        q,
        on_request={"cuda": _cuda_refusal},
    )
    q, k, v = q.detach(), k.detach(), v.detach()
    written = angles is not None and chosen in ("flash", "triton")
    if angles is not None and written:
        via = "triton" if chosen == "triton" else "auto"
        q = rotary_kv_write(q, k, v, *angles, k_cache, v_cache, slots, backend=via)
    elif angles is not None:
        q, k = _turned(q, k, *angles, chosen if chosen in ("cpu", "reference") else "auto")
    if chosen in ("flash", "triton", "cuda"):
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": slots,
            "cu_q": cu_q,
            "kv_lens": kv_lens,
            "block_tables": block_tables,
            "scale": scale,
            "softcap": softcap,
            "window": window,
            "longest": longest,
        }
        if written:
            arguments |= {"k": None, "v": None}
        return _on_gpu(chosen, arguments, sinks, shared)
    if chosen == "reference":
        return reference.paged_attention(
            q,
            k,
            v,
            k_cache,
            v_cache,
            slots,
            cu_q,
            kv_lens,
            block_tables,
            scale,
            softcap,
            window,
            sinks,
        )
    follow_torch_threads()
    out = torch.empty(q.shape, dtype=q.dtype)
    spans, lens = shared or (None, None)
    _core.paged_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        cu_q,
        kv_lens,
        block_tables,
        scale,
        softcap,
        window,
        sinks,
        spans,
        lens,
        out,
    )
    return out


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    q, k = rotary(q, k, cos[None], sin[None], backend=backend)
    return q[0].transpose(0, 1).contiguous(), k[0].transpose(0, 1).contiguous()


def _on_gpu(
    backend: str,
    arguments: dict[str, Any],
    sinks: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Run a GPU backend on what all of them take, and on the rest where it takes that."""
    if backend == "flash":
        return flash.paged_attention(**arguments)
    if backend == "cuda":
        from eapo_fast.kernels.paged_attention import cuda_kernel

        return cuda_kernel.paged_attention(**arguments, sinks=sinks)
    from eapo_fast.kernels.paged_attention import triton_kernel

    return triton_kernel.paged_attention(**arguments, sinks=sinks, shared=shared)


def _triton_refusal(q: Tensor) -> str | None:
    if q.shape[-1] > 256:
        return f"it takes head dimensions up to 256, got {q.shape[-1]}"
    return triton_refusal(q, GPU_STORAGE)


def _cuda_refusal(q: Tensor) -> str | None:
    size = q.shape[-1] * q.element_size()
    if size % 16 != 0 or q.shape[-1] > 256:
        return f"it takes head dimensions up to 256 of whole 16 bytes, got {q.shape[-1]}"
    return cuda_refusal(q, GPU_STORAGE)
