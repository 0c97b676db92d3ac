"""What each attention call of a model sees: one forward without attention, its masks read.

Sliding windows usually reach the attention function as an argument. Some models only put them
into the mask, which paged attention never gets; and a chunked or two-way mask says so nowhere
else. So the masks' own functions are asked which keys a query sees, up to the model's last
position, which a short forward would never reach.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from eapo_fast.engine.attention import CHANGES_SCORES, CallCounter, CallKey, attention_as
from eapo_fast.errors import ModelError

NAME = "eapo_probe"

_MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' (batch, head, query position, key position) -> whether the key is seen."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of a forward."""

    key: CallKey
    module: torch.nn.Module
    kv_heads: int
    width: int
    """Width of the keys, or of the values where these are wider."""
    window: int
    """Keys that a query sees, itself included; 0: all before it."""
    told: int
    """The window that the attention function is told; 0: none."""
    problem: str
    """Why paged attention cannot do the same; empty: it can."""


@dataclass(slots=True)
class _Recording:
    limit: int
    calls: list[AttentionCall] = field(default_factory=list)
    counter: CallCounter = field(default_factory=CallCounter)
    masks: dict[int, tuple[Tensor, int | None]] = field(default_factory=dict)
    """Masks and their windows by storage address; held, so that no other gets the same address."""


_recording: ContextVar[_Recording | None] = ContextVar("eapo_probe", default=None)


def attention_calls(
    model: PreTrainedModel, input_ids: Tensor, limit: int
) -> tuple[AttentionCall, ...]:
    """Return the calls that a forward over `input_ids` [1, T] makes, in order.

    The attention of this forward is all zeros; `limit` is the model's context in tokens.
    """
    recording, before = _Recording(limit), _recording.get()
    try:
        _recording.set(recording)
        with torch.no_grad(), attention_as(model, NAME):
            model(input_ids=input_ids, use_cache=False, return_dict=True)
    finally:
        _recording.set(before)
    return tuple(recording.calls)


def _record_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function of transformers: a boolean mask that remembers where it came from."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    recording = _recording.get()
    if recording is not None and mask is not None:
        window = _window(kwargs["mask_function"], recording.limit)
        recording.masks[mask.untyped_storage().data_ptr()] = mask, window
    return mask


def _record_call(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers that notes its arguments and returns zeros."""
    recording = _recording.get()
    if recording is None:
        raise ModelError(
            f"{type(module).__name__} was run by another thread while the sampler tries it out"
        )
    window, problem = _seen(recording, module, attention_mask, sliding_window or 0, others)
    call = AttentionCall(
        key=recording.counter.key(module),
        module=module,
        kv_heads=key.shape[1],
        width=max(key.shape[-1], value.shape[-1]),
        window=window,
        told=sliding_window or 0,
        problem=problem,
    )
    recording.calls.append(call)
    return value.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None


def _seen(
    recording: _Recording,
    module: torch.nn.Module,
    mask: Tensor | None,
    told: int,
    others: dict[str, Any],
) -> tuple[int, str]:
    """Return the window of a call, and why it cannot be paged or ""."""
    odd = [argument for argument in CHANGES_SCORES if others.get(argument) is not None]
    if odd:
        return told, f"it attends with {', '.join(odd)}"
    if others.get("is_causal", True) is False or getattr(module, "is_causal", True) is False:
        return told, "it attends in both directions"
    if mask is None:
        return told, ""
    held = recording.masks.get(mask.untyped_storage().data_ptr())
    if held is None:
        return told, "it attends through a mask of its own making"
    _, window = held
    if window is None:
        return (
            told,
            "its mask is neither causal nor a sliding window (chunked attention?)",
        )
    if told and told < recording.limit and told != window:
        return told, f"it is told a sliding window of {told}, its mask has {window or 'none'}"
    return window, ""


def _window(mask: _MaskFunction, limit: int) -> int | None:
    """Return how many keys a query sees, 0 for all before it, None for any other pattern."""
    keys = torch.arange(limit).unsqueeze(0)
    places = sorted({0, limit // 3, limit // 2, max(limit - 2, 0), limit - 1})
    queries = torch.tensor(places).unsqueeze(1)
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        seen = mask(zero, zero, queries, keys)
    except IndexError:  # it looks up something of the probe's own tokens
        return None
    width = int(seen[-1].sum())
    causal = (keys <= queries) & (keys > queries - width)
    if not torch.equal(seen.expand_as(causal), causal):
        return None
    return 0 if width == limit else width


AttentionInterface.register(NAME, _record_call)
AttentionMaskInterface.register(NAME, _record_mask)
