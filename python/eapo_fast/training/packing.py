"""Rollouts -> padding-free rows for the trunk, and the list of positions that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eapo_fast.rollout import Rollout
from eapo_fast.training.attention import PackedRow


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """S sequences in one packed row of T tokens, of which N targets are trained."""

    input_ids: Tensor
    """[T] int64; the last token of a rollout is left out, since nothing follows it."""
    position_ids: Tensor
    """[T] int64, restarting with each sequence."""
    row: PackedRow
    """Borders of the sequences in T."""
    rows: Tensor
    """[N] int64, positions in T whose next token is a policy token."""
    targets: Tensor
    """[N] int64, those next tokens."""
    old_logprobs: Tensor
    """[N] float32, as sampled."""
    cu_targets: Tensor
    """[S+1] int64, borders of the sequences in N."""
    advantages: Tensor
    """[S] float32."""
    banned: tuple[Tensor, Tensor]
    """Rows (in N) and token ids that had probability 0."""


def micro_batches(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    token_budget: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Cut rollouts, in order, into packed rows of at most `token_budget` tokens.

    A rollout longer than the budget gets a row of its own. The cut changes memory and speed only:
    losses are divided by global counts.
    """
    batch: list[int] = []
    used = 0
    for index, rollout in enumerate(rollouts):
        length = _length(rollout)
        if batch and used + length > token_budget:
            yield _pack([rollouts[i] for i in batch], [advantages[i] for i in batch], device)
            batch, used = [], 0
        batch.append(index)
        used += length
    if batch:
        yield _pack([rollouts[i] for i in batch], [advantages[i] for i in batch], device)


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.token_ids) - 1


def _pack(
    rollouts: Sequence[Rollout], advantages: Sequence[float], device: torch.device
) -> MicroBatch:
    lengths = [_length(r) for r in rollouts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    trained = [np.flatnonzero(r.loss_mask) for r in rollouts]
    counts = np.concatenate([[0], np.cumsum([len(t) for t in trained])])
    rows = [
        start + len(r.prompt_ids) - 1 + t
        for start, r, t in zip(starts, rollouts, trained, strict=False)
    ]
    cu_seqlens = torch.from_numpy(starts.astype(np.int32)).to(device)
    return MicroBatch(
        input_ids=_tensor([x for r in rollouts for x in (r.prompt_ids, r.token_ids[:-1])], device),
        position_ids=_tensor([np.arange(n) for n in lengths], device),
        row=PackedRow(cu_seqlens, lengths),
        rows=_tensor(rows, device),
        targets=_tensor([r.token_ids[t] for r, t in zip(rollouts, trained, strict=True)], device),
        old_logprobs=_tensor(
            [r.logprobs[t] for r, t in zip(rollouts, trained, strict=True)], device, np.float32
        ),
        cu_targets=_tensor([counts], device),
        advantages=_tensor([advantages], device, np.float32),
        banned=_banned(rollouts, trained, counts, device),
    )


def _banned(
    rollouts: Sequence[Rollout],
    trained: Sequence[NDArray[np.int64]],
    counts: NDArray[np.int64],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    rows, ids = [], []
    for start, rollout, positions in zip(counts, rollouts, trained, strict=False):
        where, tokens = rollout.banned
        rows.append(start + np.searchsorted(positions, where))
        ids.append(tokens)
    return _tensor(rows, device), _tensor(ids, device)


def _tensor(
    parts: Sequence[Sequence[float] | NDArray[np.generic]],
    device: torch.device,
    dtype: type[np.generic] = np.int64,
) -> Tensor:
    joined = np.concatenate([np.asarray(p, dtype=dtype) for p in parts])
    return torch.from_numpy(joined).to(device)
