"""Attention modules whose own code runs with a fused rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from eapo_fast.engine.attention import rotations_of_this_forward
from eapo_fast.engine.fused_forwards import Forward, Unit
from eapo_fast.engine.fused_target import Target
from eapo_fast.engine.fused_trials import same, sample, trial
from eapo_fast.engine.rotation import RotationHabit
from eapo_fast.kernels.rotary import rotary

ROTATE = "apply_rotary_pos_emb"


def attention_unit(module: nn.Module, target: Target) -> Unit | None:
    """Return an attention module's unit: its class's code with a fused rotary embedding."""
    own = type(module).forward
    rebound = _with_fused_rotary(own, target)
    return None if rebound is None else Unit(module, MethodType(rebound, module), own)


def _with_fused_rotary(own: Forward, target: Target) -> FunctionType | None:
    """`own` with the global name of the rotary embedding bound to the fused op, if it has one."""
    if not isinstance(own, FunctionType) or ROTATE not in own.__code__.co_names:
        return None
    rotate: Any = own.__globals__.get(ROTATE)
    forms = _rotary_forms(rotate, target)
    if not forms:
        return None
    fused = partial(_rotate, rotate, forms, target, RotationHabit())
    scope = {**own.__globals__, ROTATE: fused}
    rebound = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    rebound.__kwdefaults__ = own.__kwdefaults__
    return rebound


def _rotate(
    own: Forward,
    forms: Mapping[Any, bool],
    target: Target,
    habit: RotationHabit,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if len(args) == 4 and not kwargs:
        q, k, cos, sin = args
        widens = forms.get(_form(q, cos))
        fits = target.takes(q, k) and target.takes(cos, sin) and widens is not None
        if (
            fits
            and q.stride(-1) == k.stride(-1) == 1
            and cos.is_contiguous()
            and sin.is_contiguous()
        ):
            rotate = own if widens else partial(rotary, backend=target.backend)
            rotations = rotations_of_this_forward() if target.backend == "triton" else None
            if rotations is None:
                return rotate(q, k, cos, sin)
            return rotations.ask(q, k, (cos, sin), habit, rotate, widens=bool(widens))
    return own(*args, **kwargs)


def _form(q: Tensor, cos: Tensor) -> tuple[bool, torch.dtype, torch.dtype]:
    return cos.shape[-1] == q.shape[-1], q.dtype, cos.dtype


@cache
def _rotary_forms(rotate: Any, target: Target) -> dict[tuple[bool, torch.dtype, torch.dtype], bool]:
    """The kinds of argument for which `rotate` gives what the fused op gives.

    True where it gives that in float32, not yet rounded to the dtype of the queries.
    """

    def agrees(width: int, dtype: torch.dtype, angles: torch.dtype, widens: bool) -> bool:
        q, k = sample(target, dtype, 2, 5, 3, 16), sample(target, dtype, 2, 2, 3, 16, seed=1)
        cos, sin = (sample(target, angles, 2, 3, width, seed=seed) for seed in (2, 3))
        ours, own = rotary(q, k, cos, sin, backend=target.backend), rotate(q, k, cos, sin)
        if widens and any(x.dtype != torch.float32 for x in own):
            return False
        pairs = zip(ours, own, strict=True)
        return all(same(got, want.to(dtype) if widens else want) for got, want in pairs)

    found = {}
    for width in (16, 8):
        for dtype in target.dtypes:
            for angles in {dtype, torch.float32}:
                for widens in (False, True) if angles != dtype else (False,):
                    if trial(partial(agrees, width, dtype, angles, widens)):
                        found[width == 16, dtype, angles] = widens
                        break
    return found
