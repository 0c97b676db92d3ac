"""Fused ops inside the transformers model itself, for the time of a sampling call.

Between its matrix products a transformers layer runs chains of small torch ops. The modules that
hold such a chain are given another `forward` as an instance attribute: RMS norms, gated MLPs, and
attention modules, whose own code then runs with another `apply_rotary_pos_emb`. They run on the CPU
kernels or, on a GPU, in Triton, where each chain is one launch; there decoder layers too get a
forward, in which a residual sum and the norm behind it are one launch. Parameters stay where they
are, no class and no module of transformers is changed, submodules are called as modules
(LoRA layers and hooks work), and what is not recognised runs as ever.

A module is recognised by its very class, by what it is made of, and by a trial of its class on a
small input on the model's device, which must give what the fused op gives. Trials are over before
the first step, so nothing in a step waits for a GPU, and steps can be captured. Weights are looked
up at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from eapo_fast.engine.fused_forwards import (
    FusedNorm,
    Norm,
    Unit,
    mlp_unit,
    norm_unit,
)
from eapo_fast.engine.fused_layers import following_norms, layer_unit
from eapo_fast.engine.fused_rotary import attention_unit
from eapo_fast.engine.fused_target import Target, target_of
from eapo_fast.engine.mode import Step, held_together

_GEMMA = Norm(eps="eps", unit_offset=True, cast_before_weight=False)
FAMILIES = {
    "llama": ("Llama", Norm()),
    "qwen2": ("Qwen2", Norm()),
    "qwen3": ("Qwen3", Norm()),
    "qwen3_moe": ("Qwen3Moe", Norm()),
    "mistral": ("Mistral", Norm()),
    "phi3": ("Phi3", Norm()),
    "granite": ("Granite", Norm()),
    "olmo2": ("Olmo2", Norm(cast_before_weight=False)),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA),
}
"""Folder in `transformers.models`: prefix of its class names, spelling of its norm."""

_units: WeakKeyDictionary[nn.Module, dict[Target, list[Unit]]] = WeakKeyDictionary()


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[None]:
    """Run the recognised modules of `model` on fused ops; any exit undoes it, and it nests.

    Where gradients are enabled, and for tensors that the kernels do not take, a module runs its own
    forward. The model is searched once on each device: modules that were added since run unfused.
    """

    def prepare() -> tuple[Step, Step]:
        units = [unit for unit in units_of(model) if unit.is_free()]
        return lambda: _fuse(units), lambda: _undo(units)

    with held_together(model, "fused", prepare):
        yield


def _fuse(units: list[Unit]) -> None:
    for unit in units:
        vars(unit.module)["forward"] = unit.fused


def _undo(units: list[Unit]) -> None:
    for unit in units:
        vars(unit.module).pop("forward", None)
        if isinstance(unit.fused, FusedNorm):
            unit.fused.forget()


def units_of(model: nn.Module) -> list[Unit]:
    """Return the modules of `model` that can be fused where it is; remembered while it lives."""
    target = _target(model)
    if target is None:
        return []
    known = _units.setdefault(model, {})
    if target not in known:
        following = following_norms(model)
        found = (_recognise(m, following.get(m), target) for m in model.modules())
        known[target] = [unit for unit in found if unit is not None]
    return known[target]


def _target(model: nn.Module) -> Target | None:
    """Return where the model's ops run; in Triton in its dtypes only, since each is compiled."""
    device = next((p.device for p in model.parameters()), None)
    target = None if device is None else target_of(device)
    if target is None or target.backend != "triton":
        return target
    used = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled(target.device.type):
        used.add(torch.get_autocast_dtype(target.device.type))
    return replace(target, dtypes=tuple(dtype for dtype in target.dtypes if dtype in used))


def _recognise(module: nn.Module, following: nn.Module | None, target: Target) -> Unit | None:
    cls = type(module)
    for folder, (prefix, norm) in FAMILIES.items():
        home = f"transformers.models.{folder}.modeling_{folder}"
        if cls.__module__ != home or vars(sys.modules[home]).get(cls.__name__) is not cls:
            continue
        if cls.__name__ == f"{prefix}RMSNorm":
            return norm_unit(module, norm, target)
        if cls.__name__ == f"{prefix}MLP":
            return mlp_unit(module, target)
        if cls.__name__ == f"{prefix}Attention":
            return attention_unit(module, target)
        if cls.__name__ == f"{prefix}DecoderLayer" and target.backend == "triton":
            return layer_unit(module, following, target)
    return None
