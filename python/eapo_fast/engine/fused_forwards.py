"""Fused forwards of norms and MLPs, and the trials that a class must pass first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.activations import GELUTanh, SiLUActivation

from eapo_fast.engine.fused_target import Target
from eapo_fast.engine.fused_trials import same, sample, trial
from eapo_fast.kernels.gated_activation import gated_activation
from eapo_fast.kernels.rms_norm import add_rms_norm, rms_norm

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Norm:
    """How a family spells its RMS norm."""

    eps: str = "variance_epsilon"
    """Name of the attribute."""
    unit_offset: bool = False
    cast_before_weight: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A recognised module and what replaces its forward."""

    module: nn.Module
    fused: Forward
    own: Forward
    """Its class's forward, as it was tried."""
    bypassed: Sequence[nn.Module] = ()
    """Submodules that `fused` does not call."""

    def is_free(self) -> bool:
        """Whether nobody else has replaced a forward or listens to what would be bypassed."""
        return (
            "forward" not in vars(self.module)
            and type(self.module).forward is self.own
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self.bypassed)
        )


def norm_unit(module: nn.Module, form: Norm, target: Target) -> Unit | None:
    """Return an RMS norm's unit, or None when the module is not what its class promises."""
    cls: Any = type(module)
    weight = module._parameters.get("weight")
    fits = weight is not None and weight.ndim == 1 and isinstance(vars(module).get(form.eps), float)
    if module._modules or module._buffers or not fits:
        return None
    if not _norm_agrees(cls, cls.forward, form, target):
        return None
    return Unit(module, FusedNorm(module, form, target), cls.forward)


def mlp_unit(module: nn.Module, target: Target) -> Unit | None:
    """Return a gated MLP's unit, or None when it is made of other parts or another activation."""
    cls: Any = type(module)
    parts = module._modules
    activation = parts.get("act_fn" if "act_fn" in parts else "activation_fn")
    kind = _activation_kind(activation)
    build = {
        frozenset(("gate_proj", "up_proj", "down_proj", "act_fn")): _mlp_forward,
        frozenset(("gate_up_proj", "down_proj", "activation_fn")): _joint_mlp_forward,
    }.get(frozenset(parts))
    if activation is None or kind is None or build is None or module._parameters:
        return None
    if not _mlp_agrees(cls, cls.forward, build, target):
        return None
    return Unit(module, build(module, kind, target), cls.forward, (activation,))


class FusedNorm:
    """The forward of an RMS norm; with `add`, of the residual sum before it too.

    The sum is computed first and given to nobody but the caller, who hands it on; `add` leaves its
    norm here, and the norm's own call returns it if it gets that very tensor, unchanged.
    """

    def __init__(self, module: nn.Module, form: Norm, target: Target) -> None:
        self._module = module
        self._own = type(module).forward
        self._form = form
        self._target = target
        self._options: dict[str, Any] = {
            "unit_offset": form.unit_offset,
            "cast_before_weight": form.cast_before_weight,
            "backend": target.backend,
        }
        self._ready: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x and ready[1] == x._version:
            return ready[2]
        weight = self._module._parameters["weight"]
        if weight is None or not self._target.takes(x, weight):
            return self._own(self._module, x)  # type: ignore[no-any-return]
        if x.is_contiguous():
            return rms_norm(x, weight, self._eps, **self._options)
        if x.ndim == 4 and x.transpose(1, 2).is_contiguous():  # heads before tokens
            return rms_norm(x.transpose(1, 2), weight, self._eps, **self._options).transpose(1, 2)
        return self._own(self._module, x)  # type: ignore[no-any-return]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual + x`, and keep its norm for the call that follows."""
        weight = self._module._parameters["weight"]
        if weight is None or not self._fits(x, residual, weight):
            return residual + x
        total, norm = add_rms_norm(x, residual, weight, self._eps, **self._options)
        if not total.is_inference():  # whose changes nobody counts
            self._ready = total, total._version, norm
        return total

    def forget(self) -> None:
        """Let go of a norm that nobody asked for."""
        self._ready = None

    @property
    def _eps(self) -> float:
        return float(vars(self._module)[self._form.eps])

    def _fits(self, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
        narrower = x.dtype.itemsize == 2 and residual.dtype == torch.float32  # under autocast
        return (
            self._target.takes(residual, weight)
            and self._target.takes(x)
            and (x.dtype is residual.dtype or narrower)
            and x.shape == residual.shape
            and x.is_contiguous()
            and residual.is_contiguous()
        )


def _mlp_forward(module: nn.Module, kind: str, target: Target) -> Forward:
    parts: Any = module._modules

    def forward(x: Tensor) -> Tensor:
        gate, up = parts["gate_proj"](x), parts["up_proj"](x)
        if target.takes(gate, up) and gate.is_contiguous() and up.is_contiguous():
            product = gated_activation(gate, up, kind, backend=target.backend)
        else:
            product = parts["act_fn"](gate) * up
        return parts["down_proj"](product)  # type: ignore[no-any-return]

    return forward


def _joint_mlp_forward(module: nn.Module, kind: str, target: Target) -> Forward:
    parts: Any = module._modules

    def forward(x: Tensor) -> Tensor:
        both = parts["gate_up_proj"](x)
        gate, up = both.chunk(2, dim=-1)
        if target.takes(both) and both.is_contiguous():
            product = gated_activation(gate, up, kind, backend=target.backend)
        else:
            product = up * parts["activation_fn"](gate)
        return parts["down_proj"](product)  # type: ignore[no-any-return]

    return forward


def _activation_kind(module: nn.Module | None) -> str | None:
    if module is None or "forward" in vars(module):
        return None
    if type(module) in (nn.SiLU, SiLUActivation):
        return "silu"
    act = module.act if type(module) is GELUTanh else None
    if isinstance(act, partial) and act.func is gelu and act.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    return None


@cache
def _norm_agrees(cls: Any, own: Forward, form: Norm, target: Target) -> bool:
    def run() -> bool:
        for dtype in target.dtypes:
            norm = cls(48, eps=1e-3).to(target.device, dtype)
            norm.weight.copy_(sample(target, dtype, 48))
            x = sample(target, dtype, 64, 48, seed=1) * 3
            fused = FusedNorm(norm, form, target)
            if not same(fused(x), own(norm, x)):
                return False
            total = fused.add(x, x)
            if not (torch.equal(total, x + x) and same(fused(total), own(norm, total))):
                return False
        return True

    return trial(run)


@cache
def _mlp_agrees(
    cls: Any, own: Forward, build: Callable[[nn.Module, str, Target], Forward], target: Target
) -> bool:
    def run() -> bool:
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Identity(), nn.Tanh(), nn.Softsign()
        mlp.gate_up_proj = nn.Softsign()
        mlp.act_fn = mlp.activation_fn = nn.SiLU()
        inputs = [sample(target, dtype, 64, 48) * 3 for dtype in target.dtypes]
        return all(same(build(mlp, "silu", target)(x), own(mlp, x)) for x in inputs)

    return trial(run)
