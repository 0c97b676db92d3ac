"""The loss over given logits in plain torch, by autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eapo_fast.kernels.checks import compute_dtype
from eapo_fast.kernels.logits_policy_loss.finite import check_finite
from eapo_fast.kernels.policy_loss import policy_loss
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.kernels.truncated_entropy.reference import Cut, truncated_entropy
from eapo_fast.recipes import Recipe


def logits_policy_loss(
    logits: Tensor, targets: Tensor, batch: PolicyBatch, recipe: Recipe, temperature: float
) -> LossOutput:
    """Return the loss of a checked batch; float32, or float64 for float64."""
    live = None if batch.mask is None else (batch.mask != 0)[:, None]
    z = logits.to(compute_dtype(logits.dtype)) / temperature
    own = targets.long()
    if live is not None:  # rows that may hold anything: without a gradient, and never NaN
        z = torch.where(live, z, 0.0)
        own = torch.where(live[:, 0], own, 0)
    log_p = z.log_softmax(-1)
    banned = log_p == -torch.inf
    entropy = -(log_p.exp() * log_p.masked_fill(banned, 0.0)).sum(-1)
    if not torch.compiler.is_compiling():
        check_finite(entropy.detach())
    stats = dict(batch.stats or {})
    if recipe.entropy_target is not None:
        cut = Cut(recipe.entropy_target.top_p, recipe.entropy_target.top_k)
        stats["truncated_entropy"] = truncated_entropy(log_p, cut.kept(log_p.detach()))[1]
    found = policy_loss(
        log_p.gather(1, own[:, None])[:, 0],
        batch.old_logprob,
        batch.advantages,
        batch.cu_seqlens,
        recipe=recipe,
        mask=batch.mask,
        entropy=entropy,
        ref_logprob=batch.ref_logprob,
        stats=stats,
        num_tokens=batch.num_tokens,
        num_sequences=batch.num_sequences,
        backend="reference",
    )
    return replace(found, token_loss=found.token_loss.detach())
