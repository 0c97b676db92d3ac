"""The loss over given logits by the compiled kernels; csrc/cpu/logits_policy_loss.h.

A recipe that looks at single tokens makes a row its gradient while the row is in the cache. Others
take two passes: statistics of all rows, then, with the coefficients known, gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from eapo_fast import _core
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.logits_policy_loss.finite import check_finite
from eapo_fast.kernels.native import follow_torch_threads
from eapo_fast.kernels.policy_loss import compiled, operator
from eapo_fast.kernels.policy_loss import finite as losses
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.recipes import Recipe

_ELEMENTS = 1 << 20
"""Logits of the rows that the second pass takes on at once: what stays in the caches."""


def refusal(logits: Tensor, recipe: Recipe) -> str | None:
    """Return why the compiled kernels cannot run `recipe` on `logits`, or None."""
    if logits.device.type != "cpu":
        return f"the tensors are on {logits.device}"
    if logits.dtype not in (torch.float32, torch.bfloat16):
        return f"it reads float32 and bfloat16, got {logits.dtype}"
    if recipe.entropy_target is not None:
        return f"recipe {recipe.name!r} reads the truncated entropy, which it does not compute"
    if torch.compiler.is_compiling():
        return "it is no operator of torch, which torch.compile would need"
    return None


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    temperature: float,
    in_place: bool,
) -> LossOutput:
    """Return the loss of a checked batch, float32."""
    follow_torch_threads()
    source, ids = logits.detach().contiguous(), targets.long().contiguous()
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _read(source, ids, batch, recipe, temperature)[0]
    copied = source.data_ptr() != logits.data_ptr()
    if in_place and not copied:  # before anything can fail: from here on they may hold anything
        torch.autograd.graph.increment_version(logits)
    room = source if in_place or copied else torch.empty_like(source)
    if compiled.refusal(source, recipe) is None:
        found = _one_pass(source, ids, batch, recipe, temperature, room)
    else:
        found = _two_passes(source, ids, batch, recipe, temperature, room)
    loss: Tensor = _Known.apply(found.loss, logits, room)  # type: ignore[no-untyped-call]
    return replace(found, loss=loss)


def _one_pass(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    temperature: float,
    room: Tensor,
) -> LossOutput:
    """Return the loss of a token-local recipe; `room` [N, V] receives the gradient."""
    logprob = torch.zeros(len(logits))
    entropy = torch.zeros_like(logprob)
    results = compiled.Results.empty(len(logits), recipe)
    _core.logits_policy_loss(
        logits,
        targets,
        temperature=temperature,
        out=room,
        state=_blank_state(len(logits)),
        logprob=logprob,
        entropy=entropy,
        **compiled.batch_arguments(batch),
        method=compiled.method_of(recipe),
        **results.arguments(),
    )
    check_finite(entropy)
    found = results.output(compiled.names_of(recipe, batch, entropy))
    losses.check_finite(found, logprob, entropy, batch)
    return found


def _two_passes(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    temperature: float,
    room: Tensor,
) -> LossOutput:
    found, state = _read(logits, targets, batch, recipe, temperature)
    count = max(1, _ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, len(logits), count):
        part = slice(start, start + count)
        slopes = found.a[part], found.b[part].contiguous() if recipe.entropy_coef else None
        _differentiate(logits[part], targets[part], state[part], slopes, temperature, room[part])
    return found


def _read(
    logits: Tensor, targets: Tensor, batch: PolicyBatch, recipe: Recipe, temperature: float
) -> tuple[LossOutput, Tensor]:
    """Return the loss and the statistics of every row [N, LOSS_STATE]."""
    state = _blank_state(len(logits))
    _absorb(logits, targets, temperature, state=state, out=None, references=None)
    top, mass, moment, target, *_ = state.unbind(1)
    log_mass = mass.log()
    logprob, entropy = (target - top - log_mass).float(), (log_mass - moment / mass).float()
    if batch.mask is not None:
        out = batch.mask == 0
        logprob, entropy = logprob.masked_fill(out, 0.0), entropy.masked_fill(out, 0.0)
    check_finite(entropy)
    backend = "cpu" if compiled.refusal(logprob, recipe) is None else "reference"
    return operator.evaluate(logprob, entropy, None, batch, recipe, backend), state


def _differentiate(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    slopes: tuple[Tensor, Tensor | None],
    temperature: float,
    room: Tensor,
) -> None:
    """Leave the gradients of some rows, whose statistics are known, in `room`."""
    references = torch.empty(len(logits), -(-logits.shape[1] // _core.LOSS_BLOCK))
    _absorb(logits, targets, temperature, state=None, out=room, references=references)
    a, b = slopes
    active = a != 0 if b is None else (a != 0) | (b != 0)
    rows = active.nonzero().squeeze(1)
    _core.logit_gradient(
        room,
        column=0,
        references=references,
        state=state,
        targets=targets,
        source=rows,
        target=rows,
        a=a[rows].float(),
        b=None if b is None else b[rows].float(),
        temperature=temperature,
        softcap=0.0,
    )
    room[~active] = 0


def _absorb(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    state: Tensor | None,
    out: Tensor | None,
    references: Tensor | None,
) -> None:
    _core.absorb_logits(
        logits,
        column=0,
        targets=targets,
        bias=None,
        shift=None,
        own=None,
        temperature=temperature,
        softcap=0.0,
        ban_starts=None,
        ban_ids=None,
        state=state,
        powers=False,
        out=out,
        references=references,
    )


def _blank_state(rows: int) -> Tensor:
    state = torch.zeros(rows, _core.LOSS_STATE, dtype=torch.float64)
    state[:, 0] = -torch.inf
    return state


class _Known(Function):
    """The loss as a function of logits whose gradient is there; scaled only if it has to be."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient if upstream == 1 else gradient * upstream, None
