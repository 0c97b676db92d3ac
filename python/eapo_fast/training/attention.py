"""Training attention over a packed row: causal inside each sequence, never a T x T mask.

On a GPU one launch takes the whole row: flash-attn's varlen kernel where it is installed, else that
of torch (2.11 or newer). Elsewhere, and for what neither has, every sequence goes through SDPA on
its own L x L triangle. Soft caps and sinks, which SDPA lacks, are written out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from eapo_fast.engine.attention import CallKey, attention_as
from eapo_fast.errors import ModelError

NAME = "eapo_varlen"


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Borders of the S sequences in a packed row."""

    cu_seqlens: Tensor
    """[S+1] int32 on the model's device."""
    lengths: list[int]
    """Tokens of each sequence."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A packed row, and the windows of layers that put them into their mask alone."""

    row: PackedRow
    windows: Mapping[int | None, int] = field(default_factory=dict)


_current: _Running | None = None


@contextmanager
def varlen_attention(
    model: PreTrainedModel, row: PackedRow, windows: Mapping[int | None, int] | None = None
) -> Iterator[None]:
    """Use varlen attention in forward and backward (checkpointed layers run again there).

    Args:
        model: whose attention is replaced meanwhile.
        row: borders of the sequences.
        windows: sliding window of each layer that the attention function is not told, by
            `layer_idx` (`layer_windows`).
    """
    global _current
    outer = _current
    try:
        _current = _Running(row, windows or {})
        with attention_as(model, NAME):
            yield
    finally:
        _current = outer


def layer_windows(windows: Mapping[CallKey, int]) -> dict[int | None, int]:
    """Return the windows of calls as windows of layers.

    Raises:
        ModelError: a layer attends several times, with different windows.
    """
    found: dict[int | None, int] = {}
    for (layer, _), window in windows.items():
        if found.setdefault(layer, window) != window:
            raise ModelError(f"model: layer {layer} attends with two sliding windows")
    return found


@lru_cache(maxsize=1)
def _flash_varlen() -> Any | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@lru_cache(maxsize=1)
def _torch_varlen() -> Callable[..., Tensor] | None:
    """Return torch's own varlen attention, for fewer key heads than query heads too."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    kernel: Callable[..., Any] = varlen.varlen_attn
    given = set(inspect.signature(kernel).parameters)
    if not {"scale", "window_size"} <= given:
        return None
    return partial(kernel, enable_gqa=True) if "enable_gqa" in given else kernel


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
    if _current is None:
        raise ModelError(f"{NAME} attention was called outside of a training step")
    row = _current.row
    window = sliding_window or _current.windows.get(getattr(module, "layer_idx", None))
    sinks: Tensor | None = unused.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    query, key, value = _autocast(query, key, value)
    fits = sinks is None and value.shape[-1] == query.shape[-1]
    whole = _row_kernel(query, dropout, scale, window, softcap) if fits else None
    if whole is not None:
        longest = max(row.lengths)
        inputs = (x[0].transpose(0, 1) for x in (query, key, value))
        out = whole(*inputs, row.cu_seqlens, row.cu_seqlens, longest, longest)
        return out.unsqueeze(0), None
    parts = [x.split(row.lengths, dim=2) for x in (query, key, value)]
    outs = [
        _one_sequence(q, k, v, dropout, scale, window, softcap, sinks)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype where it is on, as it would cast them for SDPA.

    Rotary embeddings of float32 models leave queries and keys in float32.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _row_kernel(
    query: Tensor, dropout: float, scale: float, window: int | None, softcap: float | None
) -> Callable[..., Tensor] | None:
    """Return what attends to a packed row in one launch: q, k, v [T, H, D], borders, lengths."""
    if not _on_gpu(query) or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    sizes = (window - 1, 0) if window else (-1, -1)
    flash = _flash_varlen()
    if flash is not None:
        settings = {"dropout_p": dropout, "softmax_scale": scale, "softcap": softcap or 0.0}
        return partial(flash, causal=True, window_size=sizes, **settings)
    width = query.shape[-1]
    if softcap or dropout or width % 8 or width > 256:
        return None
    own = _torch_varlen()
    causal = (-1, 0) if not window else sizes
    return None if own is None else partial(own, scale=scale, window_size=causal)


def _on_gpu(tensor: Tensor) -> bool:
    """Return whether FlashAttention's kernels can run on a tensor's device."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one sequence, [1, H, L, D]."""
    length = q.shape[2]
    mask = None
    if window and window < length:
        offset = torch.arange(length, device=q.device)
        behind = offset[:, None] - offset[None, :]
        mask = (behind >= 0) & (behind < window)
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        joined = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
        weights = joined.softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return F.dropout(weights.to(q.dtype), dropout) @ v


AttentionInterface.register(NAME, _attend)
