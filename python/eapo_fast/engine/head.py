"""The LM head's logits, written where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eapo_fast.engine.mode import surely


@contextmanager
def head_into(model: PreTrainedModel, out: Tensor) -> Iterator[None]:
    """Have the LM head write its logits into `out` [rows, V] where it can, in this thread.

    It can if it is a plain linear layer that nobody else has replaced, for `rows` tokens of the
    weight's dtype, without gradients and outside of autocast: then the product, which is the
    same one, spares the copy of the logits. Whether the model's logits lie in `out` in the end is
    for the caller to see: a model may cap or scale them.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    own, thread = head.forward, get_ident()

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if get_ident() != thread or not _fits(rows, head, out):
            return own(x)
        if head.bias is None:
            torch.mm(rows, head.weight.t(), out=out)
        else:
            torch.addmm(head.bias, rows, head.weight.t(), out=out)
        return out.view(*x.shape[:-1], -1)

    def undo() -> None:
        vars(head).pop("forward", None)

    try:
        vars(head)["forward"] = forward
        yield
    finally:
        surely(undo)


def _fits(rows: Tensor, head: nn.Linear, out: Tensor) -> bool:
    weight, device = head.weight, rows.device.type
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device)
        and all(type(x) in (Tensor, nn.Parameter) for x in (rows, weight))
        and (rows.dtype, rows.device) == (weight.dtype, weight.device) == (out.dtype, out.device)
        and out.shape == (len(rows), len(weight))
        and out.is_contiguous()
    )
