"""`linear_policy_loss` as a torch operator, for `torch.compile`, checkpointing and autocast.

It computes the gradients together with the loss; the way back only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels import checks
from eapo_fast.kernels.checks import compute_dtype
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.linear_policy_loss.plans import run
from eapo_fast.kernels.linear_token_stats.cpu import CpuHead
from eapo_fast.kernels.linear_token_stats.finite import check_finite, first_bad
from eapo_fast.kernels.linear_token_stats.operator import (
    HEADS,
    check_values,
    empty_gradients,
    filled,
    pair,
)
from eapo_fast.kernels.policy_loss import finite
from eapo_fast.kernels.policy_loss import reference as losses
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch, check_batch
from eapo_fast.kernels.policy_loss.rows import Rows, trained_rows
from eapo_fast.kernels.truncated_entropy.reference import Cut
from eapo_fast.recipes import Recipe


@torch.library.custom_op("eapo_fast::linear_policy_loss", mutates_args=())
def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
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
    metric_names: str,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    banned_rows: Tensor | None,
    banned_ids: Tensor | None,
    chunk_size: int | None,
    plan: str,
    backend: str,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Return loss, metrics [M], a, b, c, token_loss [N], bad token, gradients of the three inputs.

    c is empty where the recipe has none, and so is a gradient that is not wanted.
    """
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
    check_batch(batch, method, len(hidden), hidden.device)
    head_settings = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "vocab_size": vocab_size,
        "chunk_size": chunk_size,
        "wanted": (to_hidden, to_weight, to_bias),
    }
    evaluate = _gathered if backend in HEADS else _on_device
    banned = pair(banned_rows, banned_ids)
    found, of_hidden, of_weight, of_bias = evaluate(
        hidden, weight, targets, batch, method, banned, plan, backend, head_settings
    )
    bad_token = found.bad_token
    if bad_token is None:
        bad_token = targets.new_full((), -1, dtype=torch.int64)
    return (
        torch.where(bad_token >= 0, torch.nan, found.loss),
        torch.stack([found.metrics[name] for name in metric_names.split()]),
        found.a,
        found.b.contiguous(),
        hidden.new_empty(0) if found.c is None else found.c,
        found.token_loss,
        bad_token,
        *filled((of_hidden, of_weight, of_bias), hidden),
    )


Found = tuple[LossOutput, Tensor | None, Tensor | None, Tensor | None]
"""A loss and the gradients of hidden, weight and bias."""


def _gathered(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    banned: tuple[Tensor, Tensor] | None,
    plan: str,
    backend: str,
    settings: dict[str, Any],
) -> Found:
    """Evaluate the masked-in rows, taken out of the batch."""
    rows = trained_rows(batch, recipe, compute_dtype(hidden.dtype))
    own = rows.gather(targets).long()
    ban_rows, ban_ids = banned or (None, None)
    check_values(own, settings["vocab_size"], ban_rows, ban_ids, len(hidden))
    head = HEADS[backend](
        rows.gather(hidden),
        weight,
        own,
        banned=None if banned is None else _banned_of(rows, banned),
        **settings,
    )
    if isinstance(head, CpuHead):
        head.guess = rows.old_logprob
    head.truncation = _cut_of(recipe)
    found = run(head, rows, recipe, plan, settings["wanted"])
    if not checks.may_look(head.entropy):
        found = replace(found, bad_token=first_bad(head.entropy, rows.index))
    of_hidden, of_weight, of_bias = head.gradients()
    head.close()
    finite.check_finite(found, rows.scatter(head.logprob), rows.scatter(head.entropy), batch)
    if of_hidden is not None and rows.index is not None:
        of_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, rows.index, of_hidden)
    return found, of_hidden, of_weight, of_bias


def _on_device(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    banned: tuple[Tensor, Tensor] | None,
    plan: str,
    backend: str,
    settings: dict[str, Any],
) -> Found:
    """Evaluate the masked-in rows where they are, as a list that the device makes."""
    from eapo_fast.kernels.linear_policy_loss import triton_plan
    from eapo_fast.kernels.linear_policy_loss.row_lists import row_list
    from eapo_fast.kernels.linear_token_stats.library_head import LibraryHead
    from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead
    from eapo_fast.kernels.linear_token_stats.triton_products import listed

    live = None if batch.mask is None else batch.mask != 0
    known = targets if live is None or targets.device.type != "cpu" else targets[live]
    ban_rows, ban_ids = banned or (None, None)
    check_values(known, settings["vocab_size"], ban_rows, ban_ids, len(hidden))
    inputs = hidden, weight, targets.long()
    head: TritonHead
    if backend == "cuda":
        head = LibraryHead(*inputs, banned=banned, lists=row_list(batch, recipe), **settings)
    else:
        rows = None if live is None else listed(live)
        head = TritonHead(*inputs, banned=banned, live=rows, **settings)
    head.truncation = _cut_of(recipe)
    found = triton_plan.run(head, batch, recipe, plan, settings["wanted"])
    if checks.may_look(head.entropy):
        own = head.rows[: int(head.count)]
        check_finite(head.entropy[own], own)
    else:
        found = replace(found, bad_token=first_bad(head.entropy))
    head.close()
    return found, *head.gradients()


@policy_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    recipe, metric_names, wanted = arguments[9], arguments[10], arguments[-3:]
    loss = hidden.new_empty((), dtype=compute_dtype(hidden.dtype))
    row = loss.new_empty(hidden.shape[0])
    c = torch.empty_like(row) if parsed(recipe).entropy_target else hidden.new_empty(0)
    return (
        loss,
        loss.new_empty(len(metric_names.split())),
        row,
        torch.empty_like(row),
        c,
        torch.empty_like(row),
        hidden.new_empty((), dtype=torch.int64),
        *empty_gradients(hidden, weight, bias, wanted),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[7:])
    ctx.stats, ctx.wanted = len(inputs[9]), inputs[-3:]


@differentiable_once
def _gradients(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None, None, None)
    return tuple(
        _scaled(gradient, upstream) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, bias = _gradients(ctx, upstream)
    of_stats: list[None] = [None] * ctx.stats
    return (hidden, weight, None, bias, *[None] * 5, of_stats, *[None] * 16)


policy_loss.register_autograd(_backward, setup_context=_setup)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Return the product; on a CPU without a copy where the factor is 1."""
    if not torch.compiler.is_compiling() and upstream.device.type == "cpu" and upstream == 1:
        return gradient
    return (gradient * upstream).to(gradient.dtype)


@lru_cache(maxsize=64)
def parsed(recipe: str) -> Recipe:
    """Return the recipe that was written as JSON."""
    return Recipe.from_json(recipe)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def described(recipe: Recipe) -> str:
    """Return the recipe as JSON, in one step for `torch.compile`."""
    return _json(recipe)


@lru_cache(maxsize=64)
def _json(recipe: Recipe) -> str:
    return recipe.to_json()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def metric_names(recipe: str, reference: bool, stats: str) -> str:
    """Return the names of the metrics, as those of a batch without rows.

    `stats` lists the statistics that are given, with their number of dimensions: "weight:1".
    """
    return _names(recipe, reference, stats)


@lru_cache(maxsize=256)
def _names(recipe: str, reference: bool, stats: str) -> str:
    none = torch.zeros(0)
    dims = (entry.split(":") for entry in stats.split())
    batch = PolicyBatch(
        old_logprob=none,
        advantages=none,
        cu_seqlens=torch.zeros(1, dtype=torch.int64),
        ref_logprob=none if reference else None,
        stats={name: torch.zeros([0] * int(count)) for name, count in dims},
    )
    method = parsed(recipe)
    truncated = none if method.entropy_target else None
    found = losses.policy_loss(
        trained_rows(batch, method, torch.float32), method, none, none, truncated
    )
    return " ".join(found.metrics)


def _cut_of(recipe: Recipe) -> Cut | None:
    """Return what the truncated entropy of a recipe keeps; None: it has none."""
    target = recipe.entropy_target
    return None if target is None else Cut(target.top_p, target.top_k)


def _banned_of(rows: Rows, banned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Renumber banned entries by trained row; those of other rows drop out."""
    if rows.index is None:
        return banned
    place = rows.index.new_full((rows.total,), -1)
    place[rows.index] = torch.arange(len(rows.index), device=place.device)
    at = place[banned[0].long()]
    kept = at >= 0
    return at[kept], banned[1][kept]
