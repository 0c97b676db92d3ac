"""The state a model is in while it is sampled, and nothing of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

_held: dict[tuple[int, str], tuple[int, ExitStack]] = {}
_held_lock = threading.Lock()


@contextmanager
def held_together(
    owner: object, name: str, change: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Make a change of `owner` once for everybody inside, in whatever thread.

    The first one in makes it, the last one out undoes it.
    """
    key, inside = (id(owner), name), False
    try:
        with _held_lock:
            users, stack = _held.get(key, (0, ExitStack()))
            if users == 0:
                stack.enter_context(change())
            _held[key] = users + 1, stack
            inside = True
        yield
    finally:
        if inside:
            _let_go(key)


def _let_go(key: tuple[int, str]) -> None:
    with _held_lock:
        users, stack = _held.pop(key)
        if users > 1:
            _held[key] = users - 1, stack
        else:
            stack.close()


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Have every module in eval mode; each is back in its own mode afterwards.

    The flags are written directly: a module's own `train()` and `eval()` don't run, since some
    merge weights there. Gradient checkpointing stays enabled; layers only use it in train mode.
    Under autocast the weights it has cast before are forgotten, because they may be older than the
    last optimizer step (autocast never looks).
    """
    if torch.is_autocast_enabled(model.device.type):
        torch.clear_autocast_cache()
    with held_together(model, "eval", lambda: _eval_flags(model)):
        yield


@contextmanager
def _eval_flags(model: PreTrainedModel) -> Iterator[None]:
    modules = [module for module in model.modules() if module.training]
    try:
        for module in modules:
            module.training = False
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
