"""A loss whose gradient is already known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def attach_gradient(loss: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `loss` (0-dim) as a function of inputs with given gradients.

    `pairs` holds (input, dloss/dinput) of equal shape; the gradient may have a wider dtype and is
    rounded once, after scaling by the upstream gradient. Differentiable once.
    """
    inputs = [x for x, _ in pairs]
    gradients = [g for _, g in pairs]
    attached = _KnownGradient.apply(loss, *inputs, *gradients)  # type: ignore[no-untyped-call]
    return cast(Tensor, attached)


class _KnownGradient(Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.dtypes = [x.dtype for x in tensors[:half]]
        ctx.save_for_backward(*tensors[half:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        scaled = [
            (upstream.to(g.dtype) * g).to(dtype) if needed else None
            for g, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=False)
        ]
        return (None, *scaled, *[None] * len(scaled))
