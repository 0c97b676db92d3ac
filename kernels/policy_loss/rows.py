"""What a policy loss is given and gives, and the trained rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from eapo_fast.errors import suggest
from eapo_fast.kernels.checks import FLAGS, FLOATS, check_cu_seqlens, check_tensor
from eapo_fast.recipes import Recipe

STATS = ("weight",)
"""Keys of `stats`. weight: a detached factor on the surrogate of each token."""


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
    """[N] each, what single recipes need; known: "weight", a factor on the surrogate."""
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
    """[N] loss of each token before aggregation, 0 where the mask is 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The n masked-in rows of a batch, in order, with all that a loss needs about them."""

    old_logprob: Tensor
    """[n]"""
    advantages: Tensor
    """[n]"""
    weight: Tensor
    """[n] share of the row in the loss; see `Recipe.aggregation`."""
    sequence: Tensor
    """[n] index of the sequence."""
    ref_logprob: Tensor | None
    """[n]"""
    factor: Tensor | None
    """[n] `stats["weight"]`."""
    lengths: Tensor
    """[S] masked-in rows of each sequence."""
    num_tokens: Tensor
    """0-dim, at least 1: tokens of the whole batch."""
    index: Tensor | None
    """[n] where the rows are in the batch; None: everywhere."""
    total: int
    """N."""

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start ... stop, for computations that look at single rows only."""
        cut = {
            f.name: value[start:stop]
            for f in fields(self)
            if f.name in _PER_ROW and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **cut)

    def scatter(self, values: Tensor) -> Tensor:
        """Spread [n] over [N], with 0 at the masked rows."""
        if self.index is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self.index, values)

    def gather(self, values: Tensor) -> Tensor:
        """Take the n rows out of [N, ...]."""
        return values if self.index is None else values.index_select(0, self.index)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum [n] over each sequence and give every row the sum of its own."""
        sums = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)
        return sums[self.sequence]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Average [n] over each sequence and give every row the mean of its own."""
        return self.sequence_sum(values) / self.lengths[self.sequence]


_PER_ROW = ("old_logprob", "advantages", "weight", "sequence", "ref_logprob", "factor", "index")


def trained_rows(batch: PolicyBatch, recipe: Recipe, dtype: torch.dtype) -> Rows:
    """Lay out the masked-in rows of a checked batch, numbers in `dtype`."""
    cu_seqlens = batch.cu_seqlens.long()
    total, sequences = len(batch.old_logprob), len(cu_seqlens) - 1
    sequence = torch.arange(sequences, device=cu_seqlens.device).repeat_interleave(
        cu_seqlens.diff(), output_size=total
    )
    index = None if batch.mask is None else (batch.mask != 0).nonzero().squeeze(1)
    if index is not None:
        sequence = sequence[index]
    lengths = torch.bincount(sequence, minlength=sequences)

    def pick(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return (values if index is None else values[index]).detach().to(dtype)

    old_logprob = pick(batch.old_logprob)
    assert old_logprob is not None
    per_sequence = len(batch.advantages) == sequences
    advantages = batch.advantages[sequence] if per_sequence else pick(batch.advantages)
    assert advantages is not None
    num_tokens = _count(batch.num_tokens, len(sequence), dtype, sequence.device)
    return Rows(
        old_logprob=old_logprob,
        advantages=advantages.detach().to(dtype),
        weight=_shares(batch, recipe, lengths, num_tokens)[sequence],
        sequence=sequence,
        ref_logprob=pick(batch.ref_logprob),
        factor=pick((batch.stats or {}).get("weight")),
        lengths=lengths,
        num_tokens=num_tokens,
        index=index,
        total=total,
    )


def _shares(batch: PolicyBatch, recipe: Recipe, lengths: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the weight of a token of each sequence [S]: its derivative of the aggregate."""
    ones = torch.ones_like(lengths, dtype=num_tokens.dtype)
    if recipe.aggregation == "token-mean":
        return ones / num_tokens
    if recipe.aggregation == "token-sum-norm":
        return ones / _max_length(recipe)
    live = (lengths > 0).sum()
    shares = ones / _count(batch.num_sequences, live, ones.dtype, ones.device)
    if recipe.aggregation == "seq-mean-token-sum":
        return shares
    if recipe.aggregation == "seq-mean-token-mean":
        return shares / lengths.clamp(min=1)
    return shares / _max_length(recipe)


def _max_length(recipe: Recipe) -> int:
    if recipe.max_length is None:
        raise ValueError(
            f"recipe {recipe.name!r}: aggregation {recipe.aggregation!r} divides by max_length, "
            "which is None; use recipe.replace(max_length=...)"
        )
    return recipe.max_length


def _count(
    given: int | Tensor | None, local: int | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    count = local if given is None else given
    return torch.as_tensor(count, dtype=dtype, device=device).clamp(min=1)


def check_batch(batch: PolicyBatch, recipe: Recipe, rows: int, device: torch.device) -> None:
    """Raise `ValueError` unless `batch` describes `rows` rows and holds what `recipe` reads."""
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
    elif recipe.beta > 0:
        raise ValueError(f"ref_logprob: recipe {recipe.name!r} has beta {recipe.beta:g}; pass it")
    for name, values in (batch.stats or {}).items():
        if name not in STATS:
            allowed = ", ".join(STATS)
            raise ValueError(f"stats: got {name!r}, known: {allowed}.{suggest(name, STATS)}")
        check_tensor(f"stats[{name!r}]", values, [rows], FLOATS, device)
