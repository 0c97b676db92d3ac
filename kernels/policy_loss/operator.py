"""`policy_loss` as a torch operator, so that `torch.compile` and fake tensors can handle it.

It computes the coefficients together with the loss; the way back only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels import checks
from eapo_fast.kernels.checks import compute_dtype
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.policy_loss import compiled, reference
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch, check_batch
from eapo_fast.kernels.policy_loss.finite import check_finite
from eapo_fast.kernels.policy_loss.metrics import metric_names
from eapo_fast.kernels.policy_loss.rows import listed, trained_rows
from eapo_fast.recipes import Recipe


@torch.library.custom_op("eapo_fast::policy_loss", mutates_args=())
def policy_loss(
    logprob: Tensor,
    entropy: Tensor | None,
    truncated: Tensor | None,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    ref_logprob: Tensor | None,
    stats: Sequence[Tensor],
    stat_names: str,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    recipe: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics [M], a, b, c, token_loss [N]; b or c is empty where it is 0."""
    method = parsed(recipe)
    batch = PolicyBatch(
        old_logprob=old_logprob,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        ref_logprob=ref_logprob,
        stats=dict(zip(stat_names.split(), stats, strict=True)),
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    check_batch(batch, method, len(logprob), logprob.device)
    found = evaluate(logprob, entropy, truncated, batch, method, backend)
    none = found.a.new_empty(0)
    return (
        found.loss,
        torch.stack(list(found.metrics.values())),
        found.a,
        found.b if method.entropy_coef else none,
        none.clone() if found.c is None else found.c,
        found.token_loss,
    )


@policy_loss.register_fake
def _(
    logprob: Tensor, entropy: Tensor | None, truncated: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    reference_given, recipe = arguments[4] is not None, parsed(arguments[-2])
    loss = logprob.new_empty((), dtype=compute_dtype(logprob.dtype))
    row, none = loss.new_empty(logprob.shape[0]), loss.new_empty(0)
    names = metric_names(recipe, reference_given, entropy is not None)
    return (
        loss,
        loss.new_empty(len(names)),
        row,
        torch.empty_like(row if recipe.entropy_coef else none),
        torch.empty_like(row if recipe.entropy_target else none),
        torch.empty_like(row),
    )


def evaluate(
    logprob: Tensor,
    entropy: Tensor | None,
    truncated: Tensor | None,
    batch: PolicyBatch,
    recipe: Recipe,
    backend: str,
    *,
    details: bool = False,
) -> LossOutput:
    """Return the detached loss of a checked batch. Raises `ValueError` if it is not finite."""
    if backend == "cpu":
        found = compiled.policy_loss(logprob, entropy, batch, recipe)
    elif backend == "triton":
        from eapo_fast.kernels.policy_loss import triton_kernel

        found = triton_kernel.policy_loss(logprob, entropy, batch, recipe)
    else:
        dtype = compute_dtype(logprob.dtype)
        waits = batch.mask is None or checks.may_look(logprob)
        rows = trained_rows(
            batch, recipe, dtype, None if waits or batch.mask is None else listed(batch.mask != 0)
        )
        given = (logprob, entropy, truncated)
        own = [None if x is None else rows.gather(x).to(dtype) for x in given]
        assert own[0] is not None
        found = reference.policy_loss(rows, recipe, own[0], own[1], own[2], details=details)
    check_finite(found, logprob, entropy, batch)
    return found


@lru_cache(maxsize=64)
def parsed(recipe: str) -> Recipe:
    """Return the recipe that was written as JSON."""
    return Recipe.from_json(recipe)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.given = len(inputs[8])
    ctx.save_for_backward(*output[2:5])


@differentiable_once
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        found = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        for i, (coefficient, dtype, wanted) in enumerate(found):
            if wanted and (len(coefficient) or not len(ctx.saved_tensors[0])):
                grads[i] = (upstream * coefficient).to(dtype)
    return (*grads, *[None] * 5, [None] * ctx.given, *[None] * 5)


policy_loss.register_autograd(_backward, setup_context=_setup)
