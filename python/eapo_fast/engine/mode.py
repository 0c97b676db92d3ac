"""The state a model is in while it is sampled, and nothing of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

Step = Callable[[], None]

_held: dict[tuple[int, str], tuple[Step, Step, set[object]]] = {}
_held_lock = threading.Lock()


@contextmanager
def held_together(
    owner: object, name: str, prepare: Callable[[], tuple[Step, Step]]
) -> Iterator[None]:
    """Make a change of `owner` once for everybody inside, in whatever thread.

    The first one in makes it, the last one out undoes it; an interrupt at any place does too.

    Args:
        owner: what is changed; it outlives the call.
        name: of the change.
        prepare: changes nothing itself; returns what makes the change and what undoes it, which
            may run twice, and after half a change.
    """
    key, token = (id(owner), name), object()
    try:
        with _held_lock:
            if key not in _held:
                _held[key] = (*prepare(), set())
            change, _, users = _held[key]
            first = not users
            users.add(token)
            if first:
                change()
        yield
    finally:
        surely(lambda: _let_go(key, token))


def surely(undo: Step) -> None:
    """Run `undo`; if an interrupt comes in between, run it again before that goes on."""
    try:
        undo()
    except BaseException:
        undo()
        raise


def _let_go(key: tuple[int, str], token: object) -> None:
    with _held_lock:
        if key not in _held:
            return
        _, undo, users = _held[key]
        users.discard(token)
        if not users:
            undo()
            _held.pop(key, None)


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

    def prepare() -> tuple[Step, Step]:
        modules = [module for module in model.modules() if module.training]
        return lambda: _set_training(modules, False), lambda: _set_training(modules, True)

    with held_together(model, "eval", prepare):
        yield


def _set_training(modules: list[torch.nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, since kernels are launched there wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which keys and values reach the KV pool: autocast's where it is on."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.dtype
