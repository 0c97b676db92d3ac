"""What a policy loss is given and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType

import torch
from torch import Tensor

from eapo_fast.errors import NonFiniteError, suggest
from eapo_fast.kernels.checks import (
    FLAGS,
    FLOATS,
    INTEGERS,
    check_cu_seqlens,
    check_tensor,
    check_total,
)
from eapo_fast.kernels.linear_token_stats.finite import no_distribution
from eapo_fast.recipes import Recipe

PER_TOKEN = (
    "weight",
    "old_entropy",
    "max_logprob",
    "kept_mass",
    "truncated_entropy",
    "selected",
    "reweighting",
    "entropy_share",
)
"""Keys of `stats` that hold [N] values."""
SCALARS = ("entropy_gap", "smoothing", "anchor", "step")
"""Keys of `stats` that hold one value."""
STATS = (*PER_TOKEN, *SCALARS, "entropy_mean", "entropy_history")
"""All keys of `stats`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyBatch:
    """N tokens of S sequences, packed one after the other; nothing in it is differentiated."""

    old_logprob: Tensor
    """[N] log-probability under the policy that sampled."""
    advantages: Tensor
    """[S] one a sequence, or [N] one a token ([S] if S = N)."""
    cu_seqlens: Tensor
    """[S + 1] integers: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]."""
    mask: Tensor | None = None
    """[N] flags: 0 takes a token out of everything, whatever it holds; None: all are in."""
    ref_logprob: Tensor | None = None
    """[N] log-probability under the reference; needed if the recipe's beta is above 0."""
    group_ids: Tensor | None = None
    """[S] prompt group of each sequence; no recipe so far reads it in the loss."""
    stats: Mapping[str, Tensor] | None = None
    """What single recipes need, by the names that `policy_loss` lists."""
    num_tokens: int | Tensor | None = None
    """Masked-in tokens of the whole batch that this is a part of; None: of this part."""
    num_sequences: int | Tensor | None = None
    """Sequences with such a token in the whole batch; None: in this part."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossOutput:
    """A loss and the coefficients of its gradient. All but `loss` is detached."""

    loss: Tensor
    """0-dim. Losses of the parts of a batch add up to the loss of the batch."""
    metrics: Mapping[str, Tensor]
    """0-dim each. Values of the parts add up too, except where the name ends in `_max`."""
    a: Tensor
    """[N] dloss/dlogprob, 0 where the mask is 0."""
    b: Tensor
    """[N] dloss/dentropy, 0 where the mask is 0."""
    c: Tensor | None = None
    """[N] dloss/d(truncated entropy); None: the recipe has no such term."""
    token_loss: Tensor
    """[N] loss of each token before aggregation, 0 where the mask is 0; without the entropy
    target, which is no sum over tokens."""
    details: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, what the recipe saw and decided, where it was asked for."""
    bad_token: Tensor | None = None
    """0-dim: the first token without a distribution, which makes the loss NaN; -1 or None: none."""

    def check(self) -> None:
        """Raise `NonFiniteError`, which names the token, if the loss is not finite.

        Losses on a GPU are returned before anybody knows; this waits for it.
        """
        if torch.isfinite(self.loss.detach()):
            return
        bad = ~torch.isfinite(self.token_loss)
        if self.bad_token is not None and int(self.bad_token) >= 0:
            raise no_distribution(int(self.bad_token))
        where = f", first at token {int(bad.nonzero()[0])}" if bad.any() else ""
        raise NonFiniteError(
            f"the loss is {float(self.loss)}{where} ({int(bad.sum())} such tokens): a "
            "log-probability, an advantage or a weight is not finite or too large; mask such "
            "tokens out, or find where they come from"
        )


def check_batch(batch: PolicyBatch, recipe: Recipe, rows: int, device: torch.device) -> None:
    """Raise `ValueError` unless `batch` describes `rows` rows and holds what `recipe` reads.

    The truncated entropy is not asked for: some callers work it out themselves.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: got {recipe!r}, a Recipe is needed; see recipes.get(name)")
    check_tensor("old_logprob", batch.old_logprob, [rows], FLOATS, device)
    check_cu_seqlens(batch.cu_seqlens, rows, device)
    check_tensor("advantages", batch.advantages, ["S or N"], FLOATS, device)
    sequences = len(batch.cu_seqlens) - 1
    if len(batch.advantages) not in (sequences, rows):
        raise ValueError(
            f"advantages: got {len(batch.advantages)} values, allowed is one a sequence "
            f"({sequences}) or one a token ({rows})"
        )
    if batch.mask is not None:
        check_tensor("mask", batch.mask, [rows], FLAGS, device)
    if batch.ref_logprob is not None:
        check_tensor("ref_logprob", batch.ref_logprob, [rows], FLOATS, device)
    check_needs(batch, recipe)
    _check_stats(batch.stats or {}, rows, device)


def check_constants(batch: PolicyBatch) -> None:
    """Raise `ValueError` for what is no batch of tensors, or wants a gradient that no loss has."""
    if not isinstance(batch, PolicyBatch):
        raise ValueError(f"batch: got {type(batch).__name__}, a PolicyBatch is needed")
    if not isinstance(batch.stats, (Mapping, NoneType)):
        raise ValueError(
            f"stats: got {type(batch.stats).__name__}, a mapping from names to tensors is needed"
        )
    given = {
        "old_logprob": batch.old_logprob,
        "advantages": batch.advantages,
        "cu_seqlens": batch.cu_seqlens,
        "mask": batch.mask,
        "ref_logprob": batch.ref_logprob,
        "group_ids": batch.group_ids,
        **{f"stats[{name!r}]": values for name, values in (batch.stats or {}).items()},
    }
    for name, values in given.items():
        if values is None and name in ("mask", "ref_logprob", "group_ids"):
            continue
        if not isinstance(values, Tensor):
            raise ValueError(f"{name}: got {type(values).__name__}, a torch tensor is needed")
        if values.requires_grad and name != "stats['truncated_entropy']":
            raise ValueError(
                f"{name}: requires a gradient, and the loss has none for it; pass {name}.detach()"
            )
    for name in batch.stats or {}:
        if name not in STATS:
            allowed = ", ".join(STATS)
            raise ValueError(f"stats: got {name!r}, known: {allowed}.{suggest(str(name), STATS)}")
    check_total("num_tokens", batch.num_tokens)
    check_total("num_sequences", batch.num_sequences)
    if batch.group_ids is not None:
        check_tensor("cu_seqlens", batch.cu_seqlens, ["S+1"], INTEGERS)
        sequences, device = len(batch.cu_seqlens) - 1, batch.cu_seqlens.device
        check_tensor("group_ids", batch.group_ids, [sequences], INTEGERS, device)


def check_needs(batch: PolicyBatch, recipe: Recipe) -> None:
    """Raise `ValueError` unless what `recipe` reads is there; see `check_batch`."""
    if batch.ref_logprob is None and recipe.beta > 0:
        raise ValueError(f"ref_logprob: recipe {recipe.name!r} has beta {recipe.beta:g}; pass it")
    stats = batch.stats or {}
    for name in recipe.stats:
        known = name in stats or (name == "old_entropy" and "reweighting" in stats)
        if not known and name != "truncated_entropy":
            raise ValueError(f"stats: recipe {recipe.name!r} reads {name!r}; pass it")


def _check_stats(stats: Mapping[str, Tensor], rows: int, device: torch.device) -> None:
    for name, values in stats.items():
        label = f"stats[{name!r}]"
        dtypes = {"selected": FLAGS, "step": INTEGERS}.get(name, FLOATS)
        if name == "entropy_history":
            check_tensor(label, values, ["K"], dtypes, device)
            if not len(values):
                raise ValueError(f"{label}: got no values; leave it out before the first one")
        elif name in SCALARS or (name == "entropy_mean" and getattr(values, "ndim", 1) == 0):
            check_tensor(label, values, [], dtypes, device)
        else:
            check_tensor(label, values, [rows], dtypes, device)
