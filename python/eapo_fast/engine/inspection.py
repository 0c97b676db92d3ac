"""Static inspection of a model: what forbids sampling, and what explains a failed trial."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from eapo_fast.engine.probe import AttentionCall

_PAGED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "mlp", "moe")
"""Values of `layer_types` whose layers keep keys and values of all tokens, or nothing. The masks
tell which of them chunked attention sees."""

_RECURRENT = re.compile(r"mamba|ssm|rwkv|lstm|deltanet|shortconv|rglru|recurrent|retention", re.I)


def base_model(model: Any) -> torch.nn.Module:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    inner: torch.nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def blockers(model: PreTrainedModel) -> list[str]:
    """Return why `model` need not even be tried, in words; empty: it can be."""
    wrong = list(_wrong_kind(model))
    return wrong or [*_wrong_layers(model), *_wrong_weights(model), *_wrong_adapters(model)]


def suspects(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> list[str]:
    """Return what may explain that a trial with these attention calls failed, in words."""
    return [*_odd_layers(model), *_silent_layers(model, calls), *_odd_forward(model)]


def _wrong_kind(model: PreTrainedModel) -> Iterator[str]:
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        inner = " Pass its `.module`." if hasattr(model, "module") else ""
        yield f"it is not a transformers model.{inner}"
        return
    if getattr(model.config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder model; only decoders can be sampled"
    if getattr(model.config, "add_cross_attention", False):
        yield "it has cross-attention layers; only decoders can be sampled"
    if model.get_output_embeddings() is None:
        yield "it has no LM head; load it as a causal LM"


def _wrong_layers(model: PreTrainedModel) -> Iterator[str]:
    """Layers with a memory that is not keys and values, which a short trial may not show."""
    kinds = {str(kind) for kind in getattr(model.config.get_text_config(), "layer_types", ()) or ()}
    other = sorted(kinds.difference(_PAGED_LAYERS))
    if other:
        yield (
            f"its config names layers of type {', '.join(other)}; only those of type "
            f"{', '.join(_PAGED_LAYERS[:2])} can be paged"
        )


def _wrong_weights(model: torch.nn.Module) -> Iterator[str]:
    """Parameters that are not whole on one device."""
    parameters = dict(model.named_parameters())
    sharded = [name for name, p in parameters.items() if _is_shard(p)]
    if sharded:
        yield (
            f"{len(sharded)} of its parameters are shards (ZeRO-3, FSDP or tensor parallel), "
            f"{sharded[0]} first; gather them around the sampling call"
        )
    meta = [name for name, p in parameters.items() if p.is_meta]
    if meta:
        yield (
            f"{len(meta)} of its parameters are on the meta device (not loaded, or offloaded), "
            f"{meta[0]} first; load the whole model onto one device"
        )
    devices = sorted({str(p.device) for p in parameters.values() if not p.is_meta})
    if len(devices) > 1:
        yield f"its parameters are on {', '.join(devices)}; put them on one device"


def _is_shard(parameter: torch.nn.Parameter) -> bool:
    if hasattr(parameter, "_is_flat_param") or hasattr(parameter, "device_mesh"):
        return True
    return parameter.numel() == 0 and hasattr(parameter, "ds_shape")


def _wrong_adapters(model: Any) -> Iterator[str]:
    """Adapters that are more than other weights in the same places."""
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            yield f"adapter {name!r} puts virtual tokens before the prompt; use LoRA or the like"
        if getattr(adapter, "alora_invocation_tokens", None):
            yield f"adapter {name!r} (aLoRA) starts in mid-sequence, which a packed row cannot tell"


def _odd_layers(model: PreTrainedModel) -> Iterator[str]:
    modules = list(model.modules())
    if _has_alibi(model.config.get_text_config(), modules):
        yield "it uses ALiBi, a bias on the scores that paged attention does not have"
    recurrent = _classes(m for m in modules if _RECURRENT.search(type(m).__name__))
    if recurrent:
        yield f"it has recurrent or state-space layers ({recurrent}), whose state is not paged"


def _silent_layers(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> Iterator[str]:
    """Attention modules of which no part called transformers' attention interface."""
    called = {call.module for call in calls}
    silent: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in silent)
        attends = "attention" in type(module).__name__.lower()
        if attends and not inside and called.isdisjoint(module.modules()):
            silent[path] = module
    if silent:
        yield f"{_classes(silent.values())} does not go through transformers' attention interface"


def _odd_forward(model: PreTrainedModel) -> Iterator[str]:
    if "position_ids" not in signature(base_model(model).forward).parameters:
        yield "its forward takes no position_ids"
    if getattr(model.config.get_text_config(), "quantization_config", None) is not None:
        yield "its weights are quantized"


def _has_alibi(config: Any, modules: Sequence[torch.nn.Module]) -> bool:
    attention = getattr(config, "attn_config", None)
    named = getattr(config, "alibi", False) or getattr(attention, "alibi", False)
    return bool(named) or any(hasattr(m, "build_alibi_tensor") for m in modules)


def _classes(modules: Iterable[torch.nn.Module]) -> str:
    """Return the names of the modules' classes, without those of whole models."""
    parts = (m for m in modules if not isinstance(m, PreTrainedModel))
    return ", ".join(sorted({type(m).__name__ for m in parts}))
