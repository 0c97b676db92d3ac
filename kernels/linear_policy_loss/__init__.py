"""The whole loss of a policy-optimization step, from hidden states: no full-batch logits."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.errors import suggest
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import FLOATS, check_tensor, refuse_transforms
from eapo_fast.kernels.linear_policy_loss import operator
from eapo_fast.kernels.linear_policy_loss.plans import PLANS
from eapo_fast.kernels.linear_token_stats import REFUSALS, autocast_head, check_head
from eapo_fast.kernels.policy_loss.batch import (
    LossOutput,
    PolicyBatch,
    check_constants,
    check_needs,
)
from eapo_fast.recipes import Recipe

__all__ = ["linear_policy_loss"]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> LossOutput:
    """Return `policy_loss` of the tokens `targets` under the LM head, differentiable in the head.

    The gradient in `hidden`, `weight` and `bias` is exact; rows whose mask is 0 never enter the
    head (their hidden states and targets may hold anything) and get gradient 0. Rows whose
    coefficients are 0 (no advantage, or clipped; with "cuda" only those without advantage) take no
    part in the gradient.

    Args:
        hidden: [N, H] states that predict `targets`; float32, float64, bfloat16 or float16.
        weight: [V, H] in the dtype of `hidden`; autocast rounds it to that.
        targets: [N] token ids.
        batch: what the policy loss needs, N rows of S sequences; see `PolicyBatch`.
        recipe: what to compute; see `Recipe`.
        bias, temperature, softcap, vocab_size, banned, chunk_size, backend: as in
            `linear_token_stats`; `banned` counts all N rows. "cuda" waits for the device once, to
            ask how many rows there are; "triton" never does.
        plan: matrix products of n x H x V, for n masked-in rows. "slab": three; a slab of logits
            becomes its gradient as soon as the coefficients of its rows are known, which takes
            whole sequences for a sequence-level recipe and the whole batch for a batch-global one.
            "prepass": four; the log-probabilities of all rows come first, so that memory does not
            depend on the recipe. "scale": two, for a head without gradients and a recipe without
            entropy terms. "auto": "slab" where slabs of `chunk_size` rows can hold what the recipe
            looks at, else "scale" where it can be had, else "prepass". All give the same.

    Raises `ValueError` for arguments that do not fit and for a backend that cannot run here;
    `NonFiniteError`, on a CPU, for a token whose logits, or what `batch` says about it, are not
    finite. On a GPU the loss is NaN then, and `LossOutput.check` raises.
    """
    check_tensor("hidden", hidden, ["N", "H"], FLOATS)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: got {recipe!r}, a Recipe is needed; see recipes.get(name)")
    refuse_transforms("hidden", hidden)
    weight = autocast_head(hidden, weight)
    check_head(hidden, weight, targets, bias, temperature, softcap, vocab_size, banned, chunk_size)
    if plan not in PLANS:
        allowed = ", ".join(PLANS)
        raise ValueError(
            f"plan: got {plan!r}, allowed is one of {allowed}.{suggest(str(plan), PLANS)}"
        )
    chosen = choose_backend("linear_policy_loss", backend, REFUSALS, hidden)
    check_constants(batch)
    check_needs(batch, recipe)
    stats = dict(batch.stats or {})
    text = operator.described(recipe)
    dims = " ".join(f"{name}:{values.ndim}" for name, values in stats.items())
    names = operator.metric_names(text, batch.ref_logprob is not None, dims)
    rows, ids = (None, None) if banned is None else banned
    loss, metrics, a, b, c, token_loss, bad_token, *_ = operator.policy_loss(
        hidden,
        weight,
        targets,
        bias,
        batch.old_logprob,
        batch.advantages,
        batch.cu_seqlens,
        batch.mask,
        batch.ref_logprob,
        list(stats.values()),
        " ".join(stats),
        _count(batch.num_tokens),
        _count(batch.num_sequences),
        text,
        names,
        float(temperature),
        softcap,
        len(weight) if vocab_size is None else vocab_size,
        rows,
        ids,
        chunk_size,
        plan,
        chosen,
        *(
            x is not None and x.requires_grad and torch.is_grad_enabled()
            for x in (hidden, weight, bias)
        ),
    )
    return LossOutput(
        loss=loss,
        metrics=dict(zip(names.split(), metrics.unbind(0), strict=True)),
        a=a,
        b=b,
        c=c if recipe.entropy_target else None,
        token_loss=token_loss,
        bad_token=bad_token,
    )


def _count(given: int | Tensor | None) -> Tensor | None:
    return torch.tensor(given) if isinstance(given, (int, float)) else given
