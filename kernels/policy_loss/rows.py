"""The trained rows of a batch: all that a loss needs to know about each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.batch import PER_TOKEN, LossOutput, PolicyBatch, check_batch
from eapo_fast.recipes import Recipe

__all__ = ["LossOutput", "PolicyBatch", "Rows", "check_batch", "norm_length", "trained_rows"]


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
    num_sequences: Tensor
    """0-dim, at least 1: sequences of the whole batch with such a row."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """[n] each, further values of the row, by the names of `PolicyBatch.stats`."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Values that all rows share, by the same names."""
    live: Tensor | None = None
    """[n] which rows count; those that don't come last, and hold 0. None: all do.

    On a GPU nobody may wait for the number of masked-in rows, so that n is N there.
    """

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start ... stop, for computations that look at single rows only."""
        cut = {
            f.name: value[start:stop]
            for f in fields(self)
            if f.name in _PER_ROW and (value := getattr(self, f.name)) is not None
        }
        stats = {name: values[start:stop] for name, values in self.stats.items()}
        return replace(self, **cut, stats=stats)

    def scatter(self, values: Tensor) -> Tensor:
        """Spread [n] over [N], with 0 at the masked rows."""
        if self.index is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self.index, self.counted(values))

    def gather(self, values: Tensor) -> Tensor:
        """Take the n rows out of [N, ...]."""
        if self.index is None:
            return values
        return self.counted(values.index_select(0, self.index))

    @property
    def count(self) -> int | Tensor:
        """How many rows count."""
        return len(self.sequence) if self.live is None else self.live.sum()

    def counted(self, values: Tensor) -> Tensor:
        """Put 0 in the place of rows of [n] that don't count."""
        if self.live is None:
            return values
        is_flag = values.dtype == torch.bool
        return values & self.live if is_flag else torch.where(self.live, values, 0)

    def mean(self, values: Tensor) -> Tensor:
        """Average [n] over the rows that count, in float64."""
        if self.live is None:
            return values.double().mean()
        return self.counted(values).double().sum() / self.count

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum [n] over each sequence and give every row the sum of its own."""
        values = self.counted(values)
        sums = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)
        return sums[self.sequence]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Average [n] over each sequence and give every row the mean of its own."""
        return self.sequence_sum(values) / self.lengths[self.sequence]

    def row_statistic(self, name: str) -> Tensor:
        """Return `stats[name]` [n]. Raises `ValueError` where the rows don't have it."""
        if name not in self.stats:
            raise ValueError(f"stats: {name!r} is needed; pass it, or resolve the rows first")
        return self.stats[name]

    def shared_statistic(self, name: str) -> Tensor:
        """Return `shared[name]`. Raises `ValueError` where the rows don't have it."""
        if name not in self.shared:
            raise ValueError(f"stats: {name!r} is needed; pass it, or resolve the rows first")
        return self.shared[name]

    def position(self) -> Tensor:
        """Return [n] integers: how many rows of its sequence come before each row."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(len(self.sequence), device=starts.device) - starts[self.sequence]


_PER_ROW = ("old_logprob", "advantages", "weight", "sequence", "ref_logprob", "factor", "index")


def listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places [C] of the flags that are set, in order, then the rest; and their number.

    Both stay on the device.
    """
    order = (~flags).to(torch.uint8).argsort(stable=True)
    return order, flags.sum().view(1)


def trained_rows(
    batch: PolicyBatch,
    recipe: Recipe,
    dtype: torch.dtype,
    listed: tuple[Tensor, Tensor] | None = None,
) -> Rows:
    """Lay out the masked-in rows of a checked batch, numbers in `dtype`.

    `listed`: (all rows [N], masked-in ones first; their number [1]), so that nothing here waits
    for the device.
    """
    cu_seqlens = batch.cu_seqlens.long()
    total, sequences = len(batch.old_logprob), len(cu_seqlens) - 1
    sequence = torch.arange(sequences, device=cu_seqlens.device).repeat_interleave(
        cu_seqlens.diff(), output_size=total
    )
    index, live, lengths = None, None, cu_seqlens.diff()
    count: int | Tensor = total
    if batch.mask is not None and listed is not None:
        index, count = listed[0], listed[1].sum()
        live = torch.arange(total, device=index.device) < count
        before = torch.cat([lengths.new_zeros(1), (batch.mask != 0).long().cumsum(0)])
        lengths = before[cu_seqlens].diff()
    elif batch.mask is not None:
        index = (batch.mask != 0).nonzero().squeeze(1)
        count, lengths = len(index), torch.bincount(sequence[index], minlength=sequences)
    if index is not None:
        sequence = sequence[index]

    def counted(values: Tensor) -> Tensor:
        return values if live is None else torch.where(live, values, 0)

    def pick(values: Tensor) -> Tensor:
        return counted(values if index is None else values[index]).detach().to(dtype)

    per_sequence = len(batch.advantages) == sequences
    advantages = batch.advantages.detach()[sequence] if per_sequence else pick(batch.advantages)
    num_tokens = _count(batch.num_tokens, count, dtype, sequence.device)
    num_sequences = _count(batch.num_sequences, (lengths > 0).sum(), dtype, sequence.device)
    stats, shared = _statistics(batch, pick, dtype)
    weight = _shares(recipe, lengths, num_tokens, num_sequences)[sequence]
    return Rows(
        old_logprob=pick(batch.old_logprob),
        advantages=counted(advantages).to(dtype),
        weight=counted(weight),
        sequence=sequence,
        ref_logprob=None if batch.ref_logprob is None else pick(batch.ref_logprob),
        factor=stats.pop("weight", None),
        lengths=lengths,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        index=index,
        total=total,
        stats=stats,
        shared=shared,
        live=live,
    )


def _statistics(
    batch: PolicyBatch, pick: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part `batch.stats` into values of rows and values that all rows share."""
    rows: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, values in (batch.stats or {}).items():
        if name == "selected":
            rows[name] = pick(values != 0) != 0
        elif name == "entropy_history":
            shared.setdefault("entropy_mean", values.detach().to(dtype).mean())
        elif name in PER_TOKEN or values.ndim:
            rows[name] = pick(values)
        else:
            shared[name] = values.detach() if name == "step" else values.detach().to(dtype)
    return rows, shared


def _shares(recipe: Recipe, lengths: Tensor, num_tokens: Tensor, num_sequences: Tensor) -> Tensor:
    """Return the weight of a token of each sequence [S]: its derivative of the aggregate."""
    ones = torch.ones_like(lengths, dtype=num_tokens.dtype)
    if recipe.aggregation == "token-mean":
        return ones / num_tokens
    if recipe.aggregation == "token-sum-norm":
        return ones / norm_length(recipe)
    shares = ones / num_sequences
    if recipe.aggregation == "seq-mean-token-sum":
        return shares
    if recipe.aggregation == "seq-mean-token-mean":
        return shares / lengths.clamp(min=1)
    return shares / norm_length(recipe)


def norm_length(recipe: Recipe) -> float:
    """Return the constant of a -norm aggregation. Raises `ValueError` where it is open."""
    if recipe.max_length is None:
        raise ValueError(
            f"recipe {recipe.name!r}: aggregation {recipe.aggregation!r} divides by max_length, "
            "which is None; use recipe.replace(max_length=...)"
        )
    return recipe.max_length


def _count(
    given: int | Tensor | None, local: int | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return on_device(local if given is None else given, dtype, device).clamp(min=1)


def on_device(number: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number on the device; one of the host is written there, which waits for nothing."""
    if isinstance(number, Tensor) and number.device == device:
        return number.to(dtype)
    return torch.full((), float(number), dtype=dtype, device=device)
