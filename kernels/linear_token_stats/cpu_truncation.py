"""Truncated distributions of rows whose exponentials are kept in tiles.

A row's kept tokens are remembered by the least log-probability among them and, since equals are
kept in the order of their ids, the last id that has it. bfloat16 exponentials have 8 digits, so
that probabilities of equal order may change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.truncated_entropy.reference import Cut, truncated_entropy

ROWS = 32
"""Rows whose whole distribution exists at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Exponentials:
    """What `_core.absorb_logits` leaves of a tile."""

    tile: Tensor
    """[R, W]"""
    references: Tensor
    """[R, blocks]"""
    columns: slice


class Truncation(NamedTuple):
    """What is left of R rows."""

    mass: Tensor
    """[R] probability of the kept tokens."""
    entropy: Tensor
    """[R] their entropy, renormalised."""
    least: Tensor
    """[R] least log-probability among them; inf where none is kept."""
    last: Tensor
    """[R] largest id that has it."""

    def of(self, rows: Tensor) -> Truncation:
        """Return that of some rows."""
        return Truncation(*(x[rows] for x in self))


def log_probabilities(left: Exponentials, state: Tensor, rows: slice | Tensor) -> Tensor:
    """Return ln p [R, W] float32 of some rows of a tile; `state` [R, LOSS_STATE] is theirs."""
    offset = left.references[rows] - state[:, :1] - state[:, 1:2].log()
    width = left.tile.shape[1]
    spread = offset.float().repeat_interleave(_core.LOSS_BLOCK, 1)[:, :width]
    return left.tile[rows].float().log().add_(spread)


def truncated(cut: Cut, kept: Sequence[Exponentials], state: Tensor) -> Truncation:
    """Truncate the rows of a slab, a few at a time."""
    count = len(state)
    numbers = (torch.empty(count), torch.empty(count), torch.empty(count))
    found = Truncation(*numbers, torch.empty(count, dtype=torch.int64))
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        log_p = torch.cat([log_probabilities(left, state[rows], rows) for left in kept], 1)
        inside = cut.kept(log_p)
        found.mass[rows], found.entropy[rows] = truncated_entropy(log_p, inside)
        least = log_p.masked_fill(~inside, torch.inf).amin(1)
        equal = inside & (log_p == least[:, None])
        found.least[rows] = least
        found.last[rows] = (equal * torch.arange(log_p.shape[1])).amax(1)
    return found


def truncated_gradient(
    cuts: Truncation,
    left: Exponentials,
    state: Tensor,
    rows: Tensor,
    c: Tensor,
    temperature: float,
    softcap: float,
) -> Tensor:
    """Return c dHt/dlogit [K, W], in the dtype of the tile, of K of its rows: a few at a time."""
    log_p = log_probabilities(left, state[rows], rows)
    dz = entropy_slope(cuts.of(rows), log_p, left.columns).mul_((c / temperature)[:, None])
    if softcap:
        y = log_p + (state[rows, :1] + state[rows, 1:2].log()).float()
        bend = y.nan_to_num(neginf=0.0) * (temperature / softcap)
        dz *= 1 - bend.square()
    return dz.to(left.tile.dtype)


def entropy_slope(cut: Truncation, log_p: Tensor, columns: slice) -> Tensor:
    """Return dHt/dy = -q (ln q + Ht) on the kept tokens of a tile, 0 elsewhere; [R, W]."""
    ids = torch.arange(columns.start, columns.start + log_p.shape[1])
    least = cut.least[:, None]
    kept = (log_p > least) | ((log_p == least) & (ids <= cut.last[:, None]))
    log_q = torch.where(kept, log_p - cut.mass.log()[:, None], 0.0)
    return torch.where(kept, -log_q.exp() * (log_q + cut.entropy[:, None]), 0.0)
