"""Policy losses from log-probabilities: clipped, sequence-level, detached and plain surrogates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import FLOATS, check_tensor, compute_dtype
from eapo_fast.kernels.gradient import attach_gradient
from eapo_fast.kernels.policy_loss import reference
from eapo_fast.kernels.policy_loss.rows import LossOutput, PolicyBatch, check_batch, trained_rows
from eapo_fast.recipes import Recipe

__all__ = ["LossOutput", "PolicyBatch", "batch_loss", "policy_loss"]

_REFUSALS: dict[str, Refusal] = {}


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    recipe: Recipe,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    stats: Mapping[str, Tensor] | None = None,
    num_tokens: int | Tensor | None = None,
    num_sequences: int | Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Return the loss of `recipe` on N packed tokens, differentiable in `logprob` and `entropy`.

    Args:
        logprob: [N] under the current policy, floating point; the loss is float32, or float64
            for float64.
        old_logprob: [N] under the policy that sampled.
        advantages: [S] one a sequence, or [N] one a token ([S] if S = N).
        cu_seqlens: [S + 1] integers, first 0, last N.
        recipe: what to compute; see `Recipe`.
        mask: [N] flags; 0 takes a token out of everything, whatever it holds.
        entropy: [N] in nats; needed if the recipe has an entropy bonus.
        ref_logprob: [N] under the reference; needed if the recipe's beta is above 0.
        stats: [N] each; "weight" is a detached factor on the surrogate of each token.
        num_tokens: masked-in tokens of the whole batch that this is a part of; None: of this part.
        num_sequences: sequences with such a token in the whole batch; None: in this part.
        backend: "auto" or "reference".

    With the counts given, losses, gradients and metrics of the parts of a batch (cut between
    sequences) add up to those of the whole; metrics that end in `_max` are maxima instead. A batch
    without a masked-in token has loss 0. Raises `ValueError` for arguments that do not fit.
    """
    check_tensor("logprob", logprob, ["N"], FLOATS)
    if entropy is not None:
        check_tensor("entropy", entropy, list(logprob.shape), FLOATS, logprob.device)
    batch = PolicyBatch(
        old_logprob=old_logprob,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        ref_logprob=ref_logprob,
        stats=stats,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    check_batch(batch, recipe, len(logprob), logprob.device)
    choose_backend("policy_loss", backend, _REFUSALS, logprob)
    return batch_loss(logprob, entropy, batch, recipe)


def batch_loss(
    logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch, recipe: Recipe
) -> LossOutput:
    """`policy_loss` of a checked batch."""
    if recipe.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy: recipe {recipe.name!r} has entropy_coef {recipe.entropy_coef:g}; pass it"
        )
    dtype = compute_dtype(logprob.dtype)
    rows = trained_rows(batch, recipe, dtype)
    own_entropy = None if entropy is None else rows.gather(entropy).to(dtype)
    found = reference.policy_loss(rows, recipe, rows.gather(logprob).to(dtype), own_entropy)
    pairs = [(logprob, found.a), *([] if entropy is None else [(entropy, found.b)])]
    return replace(found, loss=attach_gradient(found.loss, pairs))
