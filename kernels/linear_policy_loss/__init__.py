"""The whole loss of a policy-optimization step, from hidden states: no full-batch logits."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import FLOATS, INTEGERS, check_tensor, compute_dtype
from eapo_fast.kernels.linear_policy_loss import reference
from eapo_fast.kernels.linear_token_stats import check_head
from eapo_fast.kernels.policy_loss import LossOutput, PolicyBatch
from eapo_fast.kernels.policy_loss.rows import Rows, check_batch, trained_rows
from eapo_fast.recipes import Recipe

__all__ = ["linear_policy_loss"]

_REFUSALS: dict[str, Refusal] = {}


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
    backend: str = "auto",
) -> LossOutput:
    """Return `policy_loss` of the tokens `targets` under the LM head, differentiable in the head.

    The gradient in `hidden`, `weight` and `bias` is exact; rows whose mask is 0 never enter the
    head (their hidden states and targets may hold anything) and get gradient 0. Three matrix
    products of n x H x V for token-local recipes, four for others, n being the masked-in rows.

    Args:
        hidden: [N, H] states that predict `targets`; float32, float64, bfloat16 or float16.
        weight: [V, H] in the dtype of `hidden`.
        targets: [N] token ids.
        batch: what the policy loss needs, N rows of S sequences; see `PolicyBatch`.
        recipe: what to compute; see `Recipe`.
        bias, temperature, softcap, vocab_size, banned, chunk_size, backend: as in
            `linear_token_stats`; `banned` counts all N rows.

    Raises `ValueError` for arguments that do not fit and for a backend that cannot run here.
    """
    check_tensor("hidden", hidden, ["N", "H"], FLOATS)
    check_tensor("targets", targets, [len(hidden)], INTEGERS, hidden.device)
    check_batch(batch, recipe, len(hidden), hidden.device)
    choose_backend("linear_policy_loss", backend, _REFUSALS, hidden)
    rows = trained_rows(batch, recipe, compute_dtype(hidden.dtype))
    hidden, targets = rows.gather(hidden), rows.gather(targets).long()
    banned = _banned_of(rows, banned)
    check_head(hidden, weight, targets, bias, temperature, softcap, vocab_size, banned, chunk_size)
    return reference.linear_policy_loss(
        hidden,
        weight,
        targets,
        rows,
        recipe,
        bias=bias,
        temperature=float(temperature),
        softcap=softcap,
        vocab_size=vocab_size or len(weight),
        banned=banned,
        chunk_size=chunk_size,
    )


def _banned_of(rows: Rows, banned: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Renumber banned entries by trained row; those of other rows drop out."""
    if banned is None or rows.index is None:
        return banned
    place = rows.index.new_full((rows.total,), -1)
    place[rows.index] = torch.arange(len(rows.index), device=place.device)
    at = place[banned[0].long()]
    kept = at >= 0
    return at[kept], banned[1][kept]
