"""A loss whose gradient is already known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Way = Callable[..., Any]
"""A way back: takes the context and upstream gradients, returns gradients of the inputs."""

_REFUSAL = (
    b"the gradient of this loss cannot be differentiated again: its backward is once_differentiable"
)


def attach_gradient(loss: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `loss` (0-dim) as a function of inputs with given gradients.

    `pairs` holds (input, dloss/dinput) of equal shape; the gradient may have a wider dtype and is
    rounded once, after scaling by the upstream gradient. Differentiable once.
    """
    inputs = [x for x, _ in pairs]
    gradients = [g for _, g in pairs]
    attached = _KnownGradient.apply(loss, *inputs, *gradients)  # type: ignore[no-untyped-call]
    return cast(Tensor, attached)


def differentiable_once(backward: Way) -> Way:
    """Decorate a way back whose gradients must not be differentiated again.

    torch's `once_differentiable` refuses that only where the upstream gradient is itself
    differentiable; behind `loss.backward(create_graph=True)` gradients would pass for constants.
    """
    simple = once_differentiable(backward)

    @wraps(backward)
    def way(ctx: Any, *upstream: Any) -> Any:
        found = simple(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        return tuple(map(_refusing, found)) if isinstance(found, tuple) else _refusing(found)

    return way


def _refusing(gradient: Any) -> Any:
    """Return the gradient with a history that raises `RuntimeError` when it is walked."""
    if not isinstance(gradient, Tensor) or gradient.requires_grad:
        return gradient
    refuse = torch._C._functions.DelayedError(_REFUSAL, 1)
    return refuse(gradient.detach().requires_grad_())


class _KnownGradient(Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.dtypes = [x.dtype for x in tensors[:half]]
        ctx.save_for_backward(*tensors[half:])
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        scaled = [
            (upstream.to(g.dtype) * g).to(dtype) if needed else None
            for g, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=False)
        ]
        return (None, *scaled, *[None] * len(scaled))
