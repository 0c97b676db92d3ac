"""What of a model may not change unnoticed: for its trial, captured forwards, cached prefixes."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from eapo_fast.engine.mode import compute_dtype

_OWN_OF_MODULES = frozenset(vars(torch.nn.Module()))
"""Train mode (sampling sets it) and the tables of parameters, children and hooks."""


_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


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
    """Return what a captured forward has baked in: addresses, and what it does in Python."""
    addresses = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    return addresses, switches(model)


def switches(model: torch.nn.Module) -> object:
    """Return what modules do in Python: plain attributes, such as a scale or the adapters that are
    active, and the number of hooks."""
    parts: list[object] = []
    for module in model.modules():
        parts.append((id(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        parts.append(
            tuple(
                (name, plain)
                for name, value in vars(module).items()
                if name not in _OWN_OF_MODULES and (plain := _plain(value)) is not None
            )
        )
    return tuple(parts)


def weights(model: torch.nn.Module) -> object:
    """Return what changes with the weights and buffers, as far as that can be seen.

    torch counts changes in place, unless they are made through `.data`. Fused optimizers are not
    counted either, so the steps of all optimizers of the process are counted here.
    """
    tensors = (*model.parameters(), *model.buffers())
    return _optimizer_steps, tuple((x.data_ptr(), _version(x)) for x in tensors)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # torch does not count there


def _plain(value: Any) -> object:
    """Return numbers and strings, also in a list, tuple or dict; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return None
