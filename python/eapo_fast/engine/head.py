"""The LM head's logits, written where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eapo_fast.engine.casts import CastLinear
from eapo_fast.engine.mode import surely


@contextmanager
def head_into(model: PreTrainedModel, out: Tensor) -> Iterator[None]:
    """Have the LM head write its logits into `out` [rows, V] where it can, in this thread.

    It can if it is a plain linear layer that nobody else has replaced, for `rows` tokens of the
    weight's dtype and without gradients; under autocast, if its weight is cast once (see `casts`).
    Then the product, which is the same one, spares the copy of the logits. Whether the model's
    logits lie in `out` in the end is for the caller to see: a model may cap or scale them.
    """
    head = model.get_output_embeddings()
    own, before = getattr(head, "forward", None), vars(head).get("forward")
    if type(head) is not nn.Linear or not (before is None or isinstance(before, CastLinear)):
        yield
        return
    thread = get_ident()

    def forward(x: Tensor) -> Tensor:
        rows, weight, *bias = _operands(head, before, x)
        if get_ident() != thread or not _fits(rows, weight, out, before):
            return own(x)  # type: ignore[no-any-return, misc]
        if bias:
            torch.addmm(bias[0], rows, weight.t(), out=out)
        else:
            torch.mm(rows, weight.t(), out=out)
        return out.view(*x.shape[:-1], -1)

    def undo() -> None:
        if before is None:
            vars(head).pop("forward", None)
        else:
            vars(head)["forward"] = before

    try:
        vars(head)["forward"] = forward
        yield
    finally:
        surely(undo)


def _operands(head: nn.Linear, cast: CastLinear | None, x: Tensor) -> list[Tensor]:
    """Return the rows of `x`, the weight and, if there is one, the bias, as they are multiplied."""
    rows = x.reshape(-1, x.shape[-1])
    if cast is not None:
        return [rows.to(cast.dtype), *cast.copies]
    return [rows, head.weight] if head.bias is None else [rows, head.weight, head.bias]


def _fits(rows: Tensor, weight: Tensor, out: Tensor, cast: CastLinear | None) -> bool:
    kind = rows.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (
        not torch.is_grad_enabled()
        and (autocast in (None, weight.dtype) if cast is None else autocast == cast.dtype)
        and all(type(x) in (Tensor, nn.Parameter) for x in (rows, weight))
        and (rows.dtype, rows.device) == (weight.dtype, weight.device) == (out.dtype, out.device)
        and out.shape == (len(rows), len(weight))
        and out.is_contiguous()
    )
