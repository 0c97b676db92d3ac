"""What of a model may not change unnoticed: for its trial, and for captured forwards."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from eapo_fast.engine.mode import compute_dtype

_OWN_OF_MODULES = frozenset(vars(torch.nn.Module()))
"""Train mode (sampling sets it) and the tables of parameters, children and hooks."""


def structure(model: PreTrainedModel) -> object:
    """Return what decides how a model computes: its configuration, classes, dtypes, devices."""
    return (
        repr(model.config.to_dict()),
        model.config.get_text_config()._attn_implementation,
        tuple(type(module) for module in model.modules()),
        frozenset((p.dtype, p.device) for p in model.parameters()),
        compute_dtype(model),
    )


def storage(model: torch.nn.Module) -> object:
    """Return what a captured forward has baked in: addresses, and plain attributes of modules.

    The attributes hold what is Python in a forward, such as the scale and the name of the active
    adapters; hooks run in Python too.
    """
    parts: list[object] = []
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        parts.append(id(module))
        parts.extend(None if x is None else x.data_ptr() for x in tensors)
        parts.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
        parts.append(
            tuple(
                (name, plain)
                for name, value in vars(module).items()
                if name not in _OWN_OF_MODULES and (plain := _plain(value)) is not None
            )
        )
    return tuple(parts)


def _plain(value: Any) -> object:
    """Return numbers and strings, also in a list, tuple or dict; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return None
