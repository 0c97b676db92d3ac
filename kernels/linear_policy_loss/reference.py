"""LM head and policy loss in one, chunk by chunk in plain torch.

A token-local recipe knows a and b of a row as soon as the row's log-probability and entropy are
known, so each chunk of logits is turned into its gradient while it exists: three matrix products.
Any other recipe takes the statistics of all rows first and recomputes the logits: four.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eapo_fast.kernels.gradient import attach_gradient
from eapo_fast.kernels.linear_token_stats import reference as token_stats
from eapo_fast.kernels.linear_token_stats.head import Head, logit_gradient, normalise, plogp
from eapo_fast.kernels.policy_loss import reference as losses
from eapo_fast.kernels.policy_loss.rows import LossOutput, Rows
from eapo_fast.recipes import Recipe


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Rows,
    recipe: Recipe,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    banned: tuple[Tensor, Tensor] | None,
    chunk_size: int | None,
) -> LossOutput:
    """Return the loss of `recipe`; hidden [n, H], targets [n] and `banned` speak of `rows` only."""
    inputs = (hidden, weight, bias)
    wanted = tuple(x is not None and x.requires_grad for x in inputs)
    if recipe.locality == "token-local" and torch.is_grad_enabled() and any(wanted):
        head = Head(
            weight=weight.detach()[:vocab_size],
            bias=None if bias is None else bias.detach()[:vocab_size],
            temperature=temperature,
            softcap=softcap,
            banned=token_stats.sort_banned(banned),
        )
        gradients = token_stats.Gradients(hidden.detach(), weight, bias, head, wanted)
        return _one_pass(inputs, targets, rows, recipe, head, gradients, chunk_size)
    logprob, entropy = token_stats.linear_token_stats(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        banned=banned,
        extras=(),
        chunk_size=chunk_size,
    )
    found = losses.policy_loss(rows, recipe, logprob, entropy)
    pairs = [(logprob, rows.gather(found.a)), (entropy, rows.gather(found.b))]
    used = pairs if recipe.entropy_coef else pairs[:1]
    return replace(found, loss=attach_gradient(found.loss, used))


@torch.no_grad()
def _gradients_by_chunk(
    targets: Tensor,
    rows: Rows,
    recipe: Recipe,
    head: Head,
    gradients: token_stats.Gradients,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Fill `gradients` and return log-probability and entropy [n]."""
    logprob = torch.empty(len(targets), dtype=head.dtype, device=targets.device)
    entropy = torch.empty_like(logprob)
    for start, stop in head.chunks(len(targets), chunk_size):
        part = slice(start, stop)
        z, slope = head.logits(gradients.source[part], start)
        log_p, _, _ = normalise(z)
        logprob[part] = log_p.gather(1, targets[part, None]).squeeze(1)
        entropy[part] = plogp(log_p.clone(), log_p.exp()).sum(1).neg_()
        terms = losses.token_terms(rows.part(start, stop), recipe, logprob[part], entropy[part])
        dz = logit_gradient(terms.a, terms.b, log_p, entropy[part], targets[part])
        gradients.add(dz, slope, part)
    return logprob, entropy


def _one_pass(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    rows: Rows,
    recipe: Recipe,
    head: Head,
    gradients: token_stats.Gradients,
    chunk_size: int | None,
) -> LossOutput:
    logprob, entropy = _gradients_by_chunk(targets, rows, recipe, head, gradients, chunk_size)
    found = losses.policy_loss(rows, recipe, logprob, entropy)
    totals = (gradients.hidden, gradients.weight, gradients.bias)
    pairs = [
        (x, total)
        for x, total in zip(inputs, totals, strict=True)
        if x is not None and total is not None
    ]
    return replace(found, loss=attach_gradient(found.loss, pairs))
