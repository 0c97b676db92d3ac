"""Policy losses from log-probabilities: clipped, sequence-level, detached and plain surrogates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import FLOATS, check_tensor, compute_dtype, refuse_transforms
from eapo_fast.kernels.gradient import attach_gradient
from eapo_fast.kernels.native import GPU_STORAGE, triton_refusal
from eapo_fast.kernels.policy_loss import compiled, operator
from eapo_fast.kernels.policy_loss.batch import (
    LossOutput,
    PolicyBatch,
    check_batch,
    check_constants,
)
from eapo_fast.kernels.policy_loss.finite import check_inputs
from eapo_fast.kernels.policy_loss.metrics import metric_names
from eapo_fast.kernels.policy_loss.rows import trained_rows
from eapo_fast.kernels.policy_loss.statistics import resolve
from eapo_fast.recipes import Recipe

__all__ = ["LossOutput", "PolicyBatch", "policy_loss", "policy_statistics", "recipe_text"]


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
    details: bool = False,
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
        stats: further tensors by name, [N] each if nothing else is said. What `recipe.stats` lists
            is needed: "old_entropy", "max_logprob" (ln of the largest p) and "kept_mass" (of the
            tokens with p at least selection.min_p times that) under the sampling policy,
            "truncated_entropy" (differentiable) under the current one. Optional: "weight", a
            detached factor on the surrogate; "step", one integer that keys random selections;
            "anchor", one level for the entropy target (without it: the batch's own);
            "entropy_history" [K], mean entropies of the iterations up to this one, or
            "entropy_mean" (one or [N]), and "smoothing" (one), for the entropy band; what
            `policy_statistics` returns; "selected" flags of the caller's choice.
        num_tokens: masked-in tokens of the whole batch that this is a part of; None: of this part.
        num_sequences: sequences with such a token in the whole batch; None: in this part.
        details: whether to fill `LossOutput.details`, by a second, slow evaluation: "ratio",
            "clipped_low", "clipped_high", "score", "eligible", "selected", ... as far as the recipe
            has them.
        backend: "auto" (cpu for token-local recipes on the CPU, float64 aside, else reference),
            "reference", "cpu", or "triton" (when it is named; not for batch-global recipes).

    With the counts given, losses, gradients and metrics of the parts of a batch (cut between
    sequences) add up to those of the whole; metrics that end in `_max` are maxima instead. A batch
    without a masked-in token has loss 0. Raises `ValueError` for arguments that do not fit, for a
    part of a batch whose recipe needs `policy_statistics` of the whole, and (on a CPU, as
    `NonFiniteError`) for a loss or a metric that is no number, with the index of the token.
    """
    check_tensor("logprob", logprob, ["N"], FLOATS)
    if entropy is not None:
        check_tensor("entropy", entropy, list(logprob.shape), FLOATS, logprob.device)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: got {recipe!r}, a Recipe is needed; see recipes.get(name)")
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
    check_constants(batch)
    refuse_transforms("logprob", logprob)
    truncated = _read(recipe, entropy, batch)
    chosen = choose_backend(
        "policy_loss",
        backend,
        {"cpu": compiled.refusal},
        logprob,
        recipe,
        on_request={"triton": refuse_triton},
    )
    if torch.compiler.is_compiling() or type(logprob) not in (Tensor, Parameter):
        return _traced(logprob, entropy, truncated, batch, recipe, chosen)
    check_batch(batch, recipe, len(logprob), logprob.device)
    inputs = (logprob, entropy, truncated)
    found = operator.evaluate(*inputs, batch, recipe, chosen)
    if details:
        seen = operator.evaluate(*inputs, batch, recipe, "reference", details=True)
        found = replace(found, details=seen.details)
    slopes = (found.a, found.b if recipe.entropy_coef else None, found.c)
    pairs = [
        (x, slope)
        for x, slope in zip(inputs, slopes, strict=True)
        if x is not None and slope is not None and x.requires_grad
    ]
    return replace(found, loss=attach_gradient(found.loss, pairs)) if pairs else found


def refuse_triton(logprob: Tensor, recipe: Recipe) -> str | None:
    """Return why the Triton kernel cannot evaluate `recipe` on `logprob`, or None."""
    if recipe.locality == "batch-global" or recipe.entropy_band is not None:
        return f"it knows tokens and sequences, and recipe {recipe.name!r} looks at the batch"
    return triton_refusal(logprob, GPU_STORAGE)


def _traced(
    logprob: Tensor,
    entropy: Tensor | None,
    truncated: Tensor | None,
    batch: PolicyBatch,
    recipe: Recipe,
    backend: str,
) -> LossOutput:
    """`policy_loss` by its operator, which costs a fifth of a millisecond more; without details."""
    stats = dict(batch.stats or {})
    loss, values, a, b, c, token_loss = operator.policy_loss(
        logprob,
        entropy,
        truncated,
        batch.old_logprob,
        batch.advantages,
        batch.cu_seqlens,
        batch.mask,
        batch.ref_logprob,
        [values.detach() for values in stats.values()],
        " ".join(stats),
        _count(batch.num_tokens),
        _count(batch.num_sequences),
        recipe_text(recipe),
        backend,
    )
    names = metric_names(recipe, batch.ref_logprob is not None, entropy is not None)
    return LossOutput(
        loss=loss,
        metrics=dict(zip(names, values.unbind(), strict=True)),
        a=a,
        b=b if recipe.entropy_coef else torch.zeros_like(a),
        c=c if recipe.entropy_target else None,
        token_loss=token_loss,
    )


@lru_cache(maxsize=64)
def _json(recipe: Recipe) -> str:
    return recipe.to_json()


def _recipe_text(recipe: Recipe) -> str:
    """Return the recipe as JSON, also while `torch.compile` looks at the code."""
    return _json(recipe)


recipe_text: Callable[[Recipe], str] = torch.compiler.assume_constant_result(_recipe_text)


def _count(given: int | Tensor | None) -> Tensor | None:
    return torch.tensor(given) if isinstance(given, (int, float)) else given


@torch.no_grad()
def policy_statistics(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    recipe: Recipe,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    stats: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what `recipe` needs to know about a whole batch, to evaluate its parts one by one.

    Arguments as in `policy_loss`. The result holds "selected", "reweighting" and "entropy_share"
    [N] and "entropy_gap" and "entropy_mean" (0-dim), as far as the recipe reads them; it is empty
    for the others. Its [N] tensors cut like the batch, and joined to `stats` of the parts, are all
    that makes losses and gradients of the parts add up to those of the batch.
    """
    check_tensor("logprob", logprob, ["N"], FLOATS)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: got {recipe!r}, a Recipe is needed; see recipes.get(name)")
    if entropy is not None:
        check_tensor("entropy", entropy, list(logprob.shape), FLOATS, logprob.device)
    batch = PolicyBatch(
        old_logprob=old_logprob,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        stats=stats,
    )
    check_constants(batch)
    check_batch(batch, recipe.replace(beta=0.0), len(logprob), logprob.device)
    truncated = _read(recipe, entropy, batch)
    check_inputs(logprob, entropy, batch, possible=("logprob", "stats['max_logprob']"))
    dtype = compute_dtype(logprob.dtype)
    rows = trained_rows(batch, recipe, dtype)
    own = [None if x is None else rows.gather(x).to(dtype) for x in (logprob, entropy, truncated)]
    assert own[0] is not None
    known, _ = resolve(rows, recipe, own[0], own[1], own[2])
    found = {name: rows.scatter(known.stats[name]) for name in known.stats.keys() - rows.stats}
    return found | {name: known.shared[name] for name in known.shared.keys() - rows.shared}


def _read(recipe: Recipe, entropy: Tensor | None, batch: PolicyBatch) -> Tensor | None:
    """Return the truncated entropy, if any. Raises `ValueError` where what is read is missing."""
    if recipe.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy: recipe {recipe.name!r} has entropy_coef {recipe.entropy_coef:g}; pass it"
        )
    truncated = (batch.stats or {}).get("truncated_entropy")
    if recipe.entropy_target and truncated is None:
        raise ValueError(f"stats: recipe {recipe.name!r} reads 'truncated_entropy'; pass it")
    return truncated
