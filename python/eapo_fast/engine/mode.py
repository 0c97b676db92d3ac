"""The state a model is in while it is sampled, and nothing of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Have every module in eval mode; each is back in its own mode afterwards.

    The flags are written directly: a module's own `train()` and `eval()` don't run, since some
    merge weights there. Gradient checkpointing stays enabled; layers only use it in train mode.
    Under autocast the weights it has cast before are forgotten, because they may be older than the
    last optimizer step (autocast never looks).
    """
    modules = [module for module in model.modules() if module.training]
    device = model.device.type
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which keys and values reach the KV pool: autocast's where it is on."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.dtype
