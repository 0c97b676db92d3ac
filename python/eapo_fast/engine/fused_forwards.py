"""The forwards that `fused` installs, and the trials that a class must pass first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.activations import GELUTanh, SiLUActivation

from eapo_fast.kernels.gated_activation import gated_activation
from eapo_fast.kernels.native import STORAGE
from eapo_fast.kernels.rms_norm import rms_norm
from eapo_fast.kernels.rotary import rotary

Forward = Callable[..., Any]
ROTATE = "apply_rotary_pos_emb"


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


def norm_unit(module: nn.Module, form: Norm) -> Unit | None:
    """Return an RMS norm's unit, or None when the module is not what its class promises."""
    cls: Any = type(module)
    weight = module._parameters.get("weight")
    fits = weight is not None and weight.ndim == 1 and isinstance(vars(module).get(form.eps), float)
    if module._modules or module._buffers or not fits or not _norm_agrees(cls, cls.forward, form):
        return None
    return Unit(module, _norm_forward(module, form), cls.forward)


def mlp_unit(module: nn.Module) -> Unit | None:
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
    if not _mlp_agrees(cls, cls.forward, build):
        return None
    return Unit(module, build(module, kind), cls.forward, (activation,))


def attention_unit(module: nn.Module) -> Unit | None:
    """Return an attention module's unit: its class's code with a fused rotary embedding."""
    own = type(module).forward
    rebound = _with_fused_rotary(own)
    return None if rebound is None else Unit(module, MethodType(rebound, module), own)


def _takes(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take these tensors, of one dtype, and no gradient is wanted."""
    dtype = tensors[0].dtype
    return (
        dtype in STORAGE
        and not torch.is_grad_enabled()
        and all(
            type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype is dtype for t in tensors
        )
    )


def _norm_forward(module: nn.Module, form: Norm) -> Forward:
    own, parameters, attributes = type(module).forward, module._parameters, vars(module)

    def forward(x: Tensor) -> Tensor:
        weight = parameters["weight"]
        if weight is None or not _takes(x, weight) or not x.is_contiguous():
            return own(module, x)  # type: ignore[no-any-return]
        return rms_norm(
            x,
            weight,
            attributes[form.eps],
            unit_offset=form.unit_offset,
            cast_before_weight=form.cast_before_weight,
            backend="cpu",
        )

    return forward


def _mlp_forward(module: nn.Module, kind: str) -> Forward:
    parts: Any = module._modules

    def forward(x: Tensor) -> Tensor:
        gate, up = parts["gate_proj"](x), parts["up_proj"](x)
        if _takes(gate, up) and gate.is_contiguous() and up.is_contiguous():
            product = gated_activation(gate, up, kind, backend="cpu")
        else:
            product = parts["act_fn"](gate) * up
        return parts["down_proj"](product)  # type: ignore[no-any-return]

    return forward


def _joint_mlp_forward(module: nn.Module, kind: str) -> Forward:
    parts: Any = module._modules

    def forward(x: Tensor) -> Tensor:
        both = parts["gate_up_proj"](x)
        gate, up = both.chunk(2, dim=-1)
        if _takes(both) and both.is_contiguous():
            product = gated_activation(gate, up, kind, backend="cpu")
        else:
            product = up * parts["activation_fn"](gate)
        return parts["down_proj"](product)  # type: ignore[no-any-return]

    return forward


@cache
def _with_fused_rotary(own: Forward) -> FunctionType | None:
    """`own` with the global name of the rotary embedding bound to the fused op, if it has one."""
    if not isinstance(own, FunctionType) or ROTATE not in own.__code__.co_names:
        return None
    rotate: Any = own.__globals__.get(ROTATE)
    forms = _rotary_forms(rotate)
    if not forms:
        return None
    scope = {**own.__globals__, ROTATE: partial(_rotate, rotate, forms)}
    rebound = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    rebound.__kwdefaults__ = own.__kwdefaults__
    return rebound


def _rotate(own: Forward, forms: frozenset[Any], *args: Any, **kwargs: Any) -> Any:
    if len(args) == 4 and not kwargs:
        q, k, cos, sin = args
        fits = _takes(q, k) and _takes(cos, sin) and _form(q, cos) in forms
        if (
            fits
            and q.stride(-1) == k.stride(-1) == 1
            and cos.is_contiguous()
            and sin.is_contiguous()
        ):
            return rotary(q, k, cos, sin, backend="cpu")
    return own(*args, **kwargs)


def _form(q: Tensor, cos: Tensor) -> tuple[bool, torch.dtype, torch.dtype]:
    return cos.shape[-1] == q.shape[-1], q.dtype, cos.dtype


def _activation_kind(module: nn.Module | None) -> str | None:
    if module is None or "forward" in vars(module):
        return None
    if type(module) in (nn.SiLU, SiLUActivation):
        return "silu"
    act = module.act if type(module) is GELUTanh else None
    if isinstance(act, partial) and act.func is gelu and act.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    return None


def _sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same(got: Tensor, want: Tensor) -> bool:
    """Equal up to the order of sums: in bfloat16 99 % of the entries have the same bits."""
    if got.dtype is not want.dtype or got.shape != want.shape:
        return False
    if got.dtype is torch.bfloat16 and (got == want).double().mean() < 0.99:
        return False
    tolerance = 1e-2 if got.dtype is torch.bfloat16 else 1e-5
    return torch.allclose(got, want, rtol=tolerance, atol=1e-6)


def _trial(run: Callable[[], bool]) -> bool:
    """Whether `run` says so; a class that cannot even be tried is not recognised."""
    try:
        with torch.no_grad():
            return run()
    except Exception:
        return False


@cache
def _norm_agrees(cls: Any, own: Forward, form: Norm) -> bool:
    def run() -> bool:
        for dtype in STORAGE:
            norm = cls(48, eps=1e-3).to(dtype)
            norm.weight.copy_(_sample(48))
            x = (_sample(64, 48, seed=1) * 3).to(dtype)
            if not _same(_norm_forward(norm, form)(x), own(norm, x)):
                return False
        return True

    return _trial(run)


@cache
def _mlp_agrees(cls: Any, own: Forward, build: Callable[[nn.Module, str], Forward]) -> bool:
    def run() -> bool:
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Identity(), nn.Tanh(), nn.Softsign()
        mlp.gate_up_proj = nn.Softsign()
        mlp.act_fn = mlp.activation_fn = nn.SiLU()
        inputs = [(_sample(64, 48) * 3).to(dtype) for dtype in STORAGE]
        return all(_same(build(mlp, "silu")(x), own(mlp, x)) for x in inputs)

    return _trial(run)


@cache
def _rotary_forms(rotate: Any) -> frozenset[tuple[bool, torch.dtype, torch.dtype]]:
    """The kinds of argument for which `rotate` gives what the fused op gives."""

    def agrees(width: int, dtype: torch.dtype, angles: torch.dtype) -> bool:
        q, k = _sample(2, 5, 3, 16).to(dtype), _sample(2, 2, 3, 16, seed=1).to(dtype)
        cos, sin = (_sample(2, 3, width, seed=seed).to(angles) for seed in (2, 3))
        pairs = zip(rotary(q, k, cos, sin, backend="cpu"), rotate(q, k, cos, sin), strict=True)
        return all(_same(got, want) for got, want in pairs)

    dtypes = [(dtype, dtype) for dtype in STORAGE] + [(torch.bfloat16, torch.float32)]
    return frozenset(
        (width == 16, dtype, angles)
        for width in (16, 8)
        for dtype, angles in dtypes
        if _trial(partial(agrees, width, dtype, angles))
    )
