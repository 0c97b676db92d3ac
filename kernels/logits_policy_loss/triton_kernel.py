"""The loss over given logits in Triton; nothing waits for the device.

A recipe that looks at single tokens takes one launch, in which a row becomes its gradient. Others
take two, with the loss between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function

from eapo_fast.kernels import checks
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.linear_policy_loss.triton_plan import loss_of, program_of
from eapo_fast.kernels.linear_token_stats.finite import check_finite, first_bad
from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass
from eapo_fast.kernels.linear_token_stats.triton_rows import clear_rows, scale_rows
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.kernels.policy_loss.rows import listed
from eapo_fast.kernels.truncated_entropy.reference import Cut
from eapo_fast.recipes import Recipe

_BLOCK = 4096


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    temperature: float,
    in_place: bool,
    *,
    rows_of: type[RowPass] = RowPass,
) -> LossOutput:
    """Return the loss of a checked batch, float32; `rows_of` says who launches its rows."""
    source = logits.detach()
    packed = source.stride(1) == 1 and source.stride(0) >= source.shape[1]
    source = source if packed else source.clone(memory_format=torch.contiguous_format)
    live = None if batch.mask is None else listed(batch.mask != 0)
    rows = rows_of(
        targets.long().contiguous(),
        vocab_size=source.shape[1],
        temperature=temperature,
        live=live,
    )
    target = recipe.entropy_target
    rows.truncation = None if target is None else Cut(target.top_p, target.top_k)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _checked(rows, _read(rows, source, batch, recipe))
    if in_place and packed:  # before anything can fail: from here on they may hold anything
        torch.autograd.graph.increment_version(logits)
    room = source if in_place or not packed else torch.empty_like(source)
    found = _checked(rows, _differentiated(rows, source, room, batch, recipe))
    loss: Tensor = _Known.apply(found.loss, logits, room)  # type: ignore[no-untyped-call]
    return replace(found, loss=loss)


def _read(rows: RowPass, logits: Tensor, batch: PolicyBatch, recipe: Recipe) -> LossOutput:
    """Return the loss of rows, and leave their logits as they are."""
    if len(logits):
        rows.launch(logits, logits, rows.span(0, len(logits)), statistics=True, gradient=False,
                    given=True)  # fmt: skip
    return loss_of(rows, batch, recipe)


def _differentiated(
    rows: RowPass, logits: Tensor, room: Tensor, batch: PolicyBatch, recipe: Recipe
) -> LossOutput:
    """Return the loss, and leave the gradient of all logits in `room` [N, V]."""
    if not len(logits):
        return loss_of(rows, batch, recipe)
    span = rows.span(0, len(logits))
    if recipe.locality == "token-local" and recipe.entropy_band is None:
        rows.launch(logits, room, span, program=program_of(batch, recipe), statistics=True,
                    gradient=True, zeros=True, given=True)  # fmt: skip
        found = loss_of(rows, batch, recipe)
    else:
        found = _read(rows, logits, batch, recipe)
        rows.take(found.a, found.b, found.c)
        rows.launch(logits, room, span, statistics=False, gradient=True, zeros=True, given=True)
    if batch.mask is not None:
        launch: Any = clear_rows[(len(room),)]
        launch(room, rows.rows, rows.count, room.stride(0), rows.vocab, BLOCK=_block(room))
    return found


def _checked(rows: RowPass, found: LossOutput) -> LossOutput:
    """Name a row without a distribution: at once on a CPU, else to who asks for it."""
    rows.close()
    if checks.may_look(rows.entropy):
        own = rows.rows[: int(rows.count)]
        check_finite(rows.entropy[own], own)
        return found
    bad_token = first_bad(rows.entropy)
    loss = torch.where(bad_token >= 0, torch.nan, found.loss)
    return replace(found, loss=loss, bad_token=bad_token)


def _block(logits: Tensor) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(logits.shape[1])))


class _Known(Function):
    """The loss as a function of logits whose gradient is there; scaled where it lies."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError(
                "logits_policy_loss: a second way back through the same loss; its gradient is "
                "scaled in place, so compute the loss again"
            )
        gradient, ctx.gradient = ctx.gradient, None
        if len(gradient):
            launch: Any = scale_rows[(len(gradient),)]
            launch(gradient, upstream.float().reshape(1), gradient.stride(0), gradient.shape[1],
                   BLOCK=_block(gradient))  # fmt: skip
        return None, gradient, None
