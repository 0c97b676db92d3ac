"""Paged attention inside the transformers model itself.

The function is registered under a name that the mask interface does not know, so the model builds
no mask at all; the step's block tables reach it through one context object. Nothing of the model
is copied or patched: training keeps its own attention.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.mode import surely
from eapo_fast.engine.rotation import Rotations
from eapo_fast.errors import ModelError
from eapo_fast.kernels.paged_attention import paged_attention

NAME = "eapo_paged"

CallKey = tuple[int | None, int]
"""An attention call of a forward: the module's `layer_idx` and how many calls it had before."""

CHANGES_SCORES = ("position_bias", "indices", "block_indices", "block_mask", "score_mod")
"""Arguments of attention functions that alter scores or keys in ways that paging does not know."""


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Where the T tokens of one forward live: S segments over a paged cache.

    All of it is tensors on the model's device, so that a captured forward sees whatever was copied
    into them since.
    """

    cache: PagedCache
    slots: Tensor
    """[T] int64, block * block_size + offset of each token; negative: padding, written nowhere."""
    cu_q: Tensor
    """[S+1] int32, borders of the segments in the packed row."""
    kv_lens: Tensor
    """[S] int32, tokens of each sequence including this step's; 0 for padding."""
    block_tables: Tensor
    """[S, B] int32, blocks of each sequence."""
    shared: tuple[Tensor, Tensor] | None = None
    """Decode segments with a common beginning, as `paged_attention` takes them."""
    longest: tuple[int, int] | None = None
    """Most query rows and most keys of a segment."""
    windows: Mapping[CallKey, int] = field(default_factory=dict)
    """Sliding windows of layers that put them into their mask alone (see `support`)."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A step, the attention calls that its forward has made so far, and its rotary embeddings."""

    step: PagedStep
    calls: CallCounter
    rotations: Rotations


class CallCounter:
    """Names the attention calls of one forward, in their order.

    A layer that attends twice (differential attention), or that is run again with the same
    weights, keeps keys of its own for every call.
    """

    def __init__(self) -> None:
        self._seen: dict[int | None, int] = {}

    def key(self, module: torch.nn.Module) -> CallKey:
        """Return the name of the call that `module` makes now."""
        layer = getattr(module, "layer_idx", None)
        layer = layer if isinstance(layer, int) else None
        count = self._seen.get(layer, 0)
        self._seen[layer] = count + 1
        return layer, count


_current: ContextVar[_Running | None] = ContextVar("eapo_paged_step", default=None)


@contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another registered attention function; its own is back afterwards."""
    config = model.config.get_text_config()
    with turn_of(config):
        before = config._attn_implementation
        try:
            config._attn_implementation = name
            yield
        finally:
            surely(lambda: setattr(config, "_attn_implementation", before))


_turns: dict[int, tuple[weakref.ref[Any], threading.RLock]] = {}
_turns_lock = threading.Lock()


def turn_of(config: Any) -> threading.RLock:
    """Return the lock of a text configuration: forwards in several threads take turns.

    Models that were built from one configuration object share its attention function.
    """
    with _turns_lock:
        held = _turns.get(id(config))
        if held is None or held[0]() is not config:
            for key in [k for k, (owner, _) in _turns.items() if owner() is None]:
                del _turns[key]
            held = _turns[id(config)] = weakref.ref(config), threading.RLock()
        return held[1]


@contextmanager
def paged_forward(model: PreTrainedModel, step: PagedStep) -> Iterator[None]:
    """Run the model's forward on a paged step; its own attention is back afterwards."""
    rotations, before = Rotations(), _current.get()

    def undo() -> None:
        _current.set(before)

    try:  # nothing is set outside of it, where an interrupt would leave it set
        _current.set(_Running(step, CallCounter(), rotations))
        with attention_as(model, NAME):
            yield
        rotations.finish()
    finally:
        surely(undo)


def rotations_of_this_forward() -> Rotations | None:
    """Return the rotary embeddings of the paged forward that runs, if one does."""
    running = _current.get()
    return None if running is None else running.rotations


def paged_logits(
    model: PreTrainedModel,
    step: PagedStep,
    input_ids: Tensor,
    positions: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Run the model on a paged step, without gradients; returns logits [L, V].

    Args:
        model: causal LM in eval mode (see `sampling_mode`).
        step: where the T tokens live.
        input_ids: [T] int64.
        positions: [T] int64, place of each token in its sequence.
        rows: [L] int64, rows whose logits are wanted, ascending; None: all T.
    """
    # The pool may be first met, and so allocated, inside of somebody's inference mode.
    with torch.inference_mode(False), torch.no_grad(), paged_forward(model, step):
        logits: Tensor = model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            return_dict=True,
            logits_to_keep=0 if rows is None else rows,
        ).logits[0]
    if rows is not None and len(logits) != len(rows):
        return logits[rows]
    return logits


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: q [1, H, T, D], k, v [1, Hkv, T, D] -> [1, T, H, Dv]."""
    running = _current.get()
    if running is None:
        raise ModelError(
            f"{type(module).__name__} was run by another thread while it is sampled: wait until "
            f"the sampling call is over, or give that thread a model (and config) of its own"
        )
    _refuse(module, attention_mask, others)
    step = running.step
    call = running.calls.key(module)
    angles = running.rotations.take(module, query, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    value_width = value.shape[-1]
    query, key, value = _packed(query, key, value)
    k_cache, v_cache = step.cache.layer(call, key)
    sinks = others.get("s_aux") if others.get("s_aux") is not None else others.get("sinks")
    out = paged_attention(
        query,
        key,
        value,
        k_cache,
        v_cache,
        slots=step.slots,
        cu_q=step.cu_q,
        kv_lens=step.kv_lens,
        block_tables=step.block_tables,
        scale=scale,
        softcap=float(softcap or 0.0),
        window=int(sliding_window or step.windows.get(call, 0)),
        sinks=sinks,
        angles=angles,
        shared=step.shared,
        longest=step.longest,
    )
    return out[..., :value_width].unsqueeze(0), None


def _refuse(module: torch.nn.Module, mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise `ModelError` for attention that is not causal attention over the row's own keys."""
    name = type(module).__name__
    if mask is not None:
        raise ModelError(f"{name} attends through a mask of its own making")
    odd = [argument for argument in CHANGES_SCORES if others.get(argument) is not None]
    if odd:
        raise ModelError(f"{name} attends with {', '.join(odd)}, which cannot be paged")
    if others.get("is_causal", True) is False:
        raise ModelError(f"{name} attends in both directions")


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as [T, heads, width] of one width and, under autocast, of its dtype.

    Zeros that pad keys and queries change no score; those that pad values end up in columns of the
    result that are cut off.
    """
    width = max(query.shape[-1], value.shape[-1])
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def packed(x: Tensor) -> Tensor:
        x = x[0].transpose(0, 1)
        if dtype is not None and x.dtype != torch.float64:
            x = x.to(dtype)
        if x.shape[-1] != width:
            return F.pad(x, (0, width - x.shape[-1]))
        return x.contiguous()

    return packed(query), packed(key), packed(value)


AttentionInterface.register(NAME, _attend)
