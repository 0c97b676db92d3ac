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

_ROWS = 32
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


def truncations(cut: Cut, kept: Sequence[Exponentials], state: Tensor) -> list[Truncation]:
    """Truncate the rows of a slab, some at a time."""
    found = []
    for start in range(0, len(state), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = torch.cat([log_probabilities(left, state[rows], rows) for left in kept], 1)
        inside = cut.kept(log_p)
        mass, entropy = truncated_entropy(log_p, inside)
        least = log_p.masked_fill(~inside, torch.inf).amin(1)
        equal = inside & (log_p == least[:, None])
        last = (equal * torch.arange(log_p.shape[1])).amax(1)
        found.append(Truncation(mass, entropy, least, last))
    return found


def truncated_gradient(
    cuts: Sequence[Truncation],
    left: Exponentials,
    state: Tensor,
    source: Tensor,
    c: Tensor,
    temperature: float,
    softcap: float,
) -> Tensor:
    """Return c dHt/dlogit [K, W], in the dtype of the tile, of its rows `source` [K]."""
    whole = Truncation(*(torch.cat(column) for column in zip(*cuts, strict=True)))
    out = torch.empty_like(left.tile[: len(source)])
    for part in torch.arange(len(source)).split(_ROWS):
        rows = source[part]
        log_p = log_probabilities(left, state[rows], rows)
        dz = entropy_slope(whole.of(rows), log_p, left.columns) * (c[part] / temperature)[:, None]
        if softcap:
            y = log_p + (state[rows, :1] + state[rows, 1:2].log()).float()
            bend = y.nan_to_num(neginf=0.0) * (temperature / softcap)
            dz *= 1 - bend.square()
        out[part] = dz.to(out.dtype)
    return out


def entropy_slope(cut: Truncation, log_p: Tensor, columns: slice) -> Tensor:
    """Return dHt/dy = -q (ln q + Ht) on the kept tokens of a tile, 0 elsewhere; [R, W]."""
    ids = torch.arange(columns.start, columns.start + log_p.shape[1])
    least = cut.least[:, None]
    kept = (log_p > least) | ((log_p == least) & (ids <= cut.last[:, None]))
    log_q = torch.where(kept, log_p - cut.mass.log()[:, None], 0.0)
    return torch.where(kept, -log_q.exp() * (log_q + cut.entropy[:, None]), 0.0)
