"""Paged attention inside the transformers model itself.

The function is registered under a name that the mask interface does not know, so the model builds
no mask at all; the step's block tables reach it through one context object. Nothing of the model
is copied or patched: training keeps its own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from eapo_fast.engine.cache import PagedCache
from eapo_fast.errors import ModelError
from eapo_fast.kernels.paged_attention import paged_attention

NAME = "eapo_paged"


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Where the T tokens of one forward live: S segments over a paged cache."""

    cache: PagedCache
    slots: Tensor
    """[T] int64, block * block_size + offset of each token."""
    cu_q: Tensor
    """[S+1] int32, borders of the segments in the packed row."""
    kv_lens: Tensor
    """[S] int32, tokens of each sequence including this step's."""
    block_tables: Tensor
    """[S, B] int32, blocks of each sequence."""


_current: PagedStep | None = None


@contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another registered attention function; its own is back afterwards."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def paged_forward(model: PreTrainedModel, step: PagedStep) -> Iterator[None]:
    """Run the model's forward on a paged step; its own attention is back afterwards."""
    global _current
    outer, _current = _current, step
    try:
        with attention_as(model, NAME):
            yield
    finally:
        _current = outer


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: q [1, H, T, D], k, v [1, Hkv, T, D] -> [1, T, H, D]."""
    step = _current
    if step is None:
        raise ModelError(f"{NAME} attention was called outside of a sampling step")
    if unused.get("s_aux") is not None or unused.get("sinks") is not None:
        raise ModelError("attention sinks are not supported by the sampler")
    k_cache, v_cache = step.cache.layer(int(module.layer_idx), key)  # type: ignore[arg-type]
    packed = query[0].transpose(0, 1).contiguous()
    out = paged_attention(
        packed,
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        k_cache,
        v_cache,
        slots=step.slots,
        cu_q=step.cu_q,
        kv_lens=step.kv_lens,
        block_tables=step.block_tables,
        scale=packed.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(softcap or 0.0),
        window=int(sliding_window or 0),
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attend)
