"""Training attention over a packed row: causal inside each sequence, never a T x T mask.

FlashAttention's varlen kernel serves a GPU when it is installed; otherwise sequences of equal
shape go through torch's SDPA together, each on its own L x L triangle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from eapo_fast.engine.attention import attention_as
from eapo_fast.errors import ModelError

NAME = "eapo_varlen"


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Borders of the S sequences in a packed row."""

    cu_seqlens: Tensor
    """[S+1] int32 on the model's device."""
    lengths: list[int]
    """Tokens of each sequence."""


_current: PackedRow | None = None


@contextmanager
def varlen_attention(model: PreTrainedModel, row: PackedRow) -> Iterator[None]:
    """Use varlen attention in forward and backward (checkpointed layers run again there)."""
    global _current
    outer, _current = _current, row
    try:
        with attention_as(model, NAME):
            yield
    finally:
        _current = outer


@lru_cache(maxsize=1)
def _flash_varlen() -> Any | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: q [1, H, T, D], k, v [1, Hkv, T, D] -> [1, T, H, D]."""
    row = _current
    if row is None:
        raise ModelError(f"{NAME} attention was called outside of a training step")
    if unused.get("s_aux") is not None:
        raise ModelError("attention sinks are not supported in training")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    flash = _flash_varlen() if query.is_cuda and query.dtype != torch.float32 else None
    if flash is not None:
        longest = max(row.lengths)
        out = flash(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            row.cu_seqlens,
            row.cu_seqlens,
            longest,
            longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
            softcap=softcap or 0.0,
        )
        return out.unsqueeze(0), None
    parts = [x.split(row.lengths, dim=2) for x in (query, key, value)]
    outs = [
        _one_sequence(q, k, v, dropout, scale, sliding_window, softcap)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of one sequence, [1, H, L, D]."""
    length = q.shape[2]
    mask = None
    if window and window < length:
        offset = torch.arange(length, device=q.device)
        behind = offset[:, None] - offset[None, :]
        mask = (behind >= 0) & (behind < window)
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(q.dtype), dropout) @ v


AttentionInterface.register(NAME, _attend)
