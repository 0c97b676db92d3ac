"""Weights that autocast would cast, cast once for the time of a sampling call.

A captured forward cannot keep what autocast casts: it would read every float32 weight and write its
copy at every step, where a decode step otherwise reads the copy alone. So its linear modules get a
copy of their weight in autocast's dtype, written anew when sampling begins; the products are
autocast's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eapo_fast.engine.mode import Step, held_together


class _Inputs:
    """The input that was cast last: the products of one input share its copy."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` as autocast would hand it to a product, which casts float32 and 16 bits."""
        if x.dtype == dtype or x.dtype == torch.float64 or type(x) is not Tensor:
            return x
        if x.is_inference():  # changes are not counted there
            return x
        last = self._last
        if last is None or last[0] is not x or last[1] != x._version or last[2].dtype != dtype:
            last = self._last = x, x._version, x.to(dtype)
        return last[2]

    def forget(self) -> None:
        """Let go of it."""
        self._last = None


class CastLinear:
    """The forward of a linear module while it is sampled under autocast.

    Where gradients are enabled, or autocast is off in a thread, the module's own forward runs.
    """

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self._module, self.dtype = module, dtype
        self.inputs = _Inputs()
        with torch.inference_mode(False):
            self.copies = [torch.empty_like(x, dtype=dtype) for x in self.sources()]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product that autocast would make of `x` [..., in]."""
        kind = x.device.type
        if torch.is_grad_enabled() or not torch.is_autocast_enabled(kind):
            return nn.Linear.forward(self._module, x)
        if torch.get_autocast_dtype(kind) != self.dtype:
            return nn.Linear.forward(self._module, x)
        weight, *bias = self.copies
        return F.linear(self.inputs.cast(x, self.dtype), weight, *bias)

    def sources(self) -> list[Tensor]:
        """Return the weight and, if there is one, the bias."""
        found = [self._module.weight.detach()]
        return found if self._module.bias is None else [*found, self._module.bias.detach()]

    def fits(self) -> bool:
        """Whether the copies are still like what they are copies of."""
        mine = [(x.shape, x.device) for x in self.copies]
        return mine == [(x.shape, x.device) for x in self.sources()]


_Key = tuple[nn.Module, torch.dtype]

_casts: WeakKeyDictionary[nn.Module, dict[_Key, CastLinear]] = WeakKeyDictionary()
"""Of each model that was sampled so, while it lives."""


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Have the linear modules of `model` multiply by cast copies; any exit undoes it, and it nests.

    On a GPU under autocast; elsewhere nothing happens. The weights must not change inside. Copies
    are kept for the next time, since captured forwards read them where they lie.
    """
    dtype = _wanted(model)
    if dtype is None:
        yield
        return

    def prepare() -> tuple[Step, Step]:
        modules = [m for m in model.modules() if _takes(m, dtype)]
        return lambda: _replace(model, modules, dtype), lambda: _undo(modules)

    with held_together(model, "casts", prepare):
        yield


def _wanted(model: nn.Module) -> torch.dtype | None:
    """Return autocast's dtype on the model's device, if there is something to be gained."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cuda" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _takes(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module is a linear one whose weight autocast would cast, and is nobody else's."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32 != dtype
        and "forward" not in vars(module)
    )


@torch.no_grad()
def _replace(model: nn.Module, modules: list[nn.Module], dtype: torch.dtype) -> None:
    there = set(model.modules())
    kept = {key: cast for key, cast in _casts.get(model, {}).items() if key[0] in there}
    _casts[model] = kept  # also of modules left out this time: captured forwards may read them yet
    inputs = _Inputs()
    for module in modules:
        assert isinstance(module, nn.Linear)
        cast = kept.get((module, dtype))
        if cast is None or not cast.fits():
            cast = kept[module, dtype] = CastLinear(module, dtype)
        for copy, source in zip(cast.copies, cast.sources(), strict=True):
            copy.copy_(source)
        cast.inputs = inputs
        vars(module)["forward"] = cast


def _undo(modules: list[nn.Module]) -> None:
    for module in modules:
        cast = vars(module).pop("forward", None)
        if isinstance(cast, CastLinear):
            cast.inputs.forget()
