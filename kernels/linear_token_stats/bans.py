"""Banned entries of the rows of an LM head, by row."""

from __future__ import annotations

import torch
from torch import Tensor


class Bans:
    """Entries (row, id) with probability 0, for n rows."""

    def __init__(self, banned: tuple[Tensor, Tensor], rows: int) -> None:
        where, order = banned[0].long().sort(stable=True)
        self.ids = banned[1][order].int()
        counts = torch.bincount(where, minlength=rows)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def of(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return starts [R + 1] and ids [B], int32: ids[starts[i] : starts[i + 1]] are of row i."""
        begins, ends = self.starts[:-1][rows], self.starts[1:][rows]
        counts = ends - begins
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        offsets = (begins - starts[:-1]).repeat_interleave(counts)
        return starts.int(), self.ids[offsets + torch.arange(len(offsets))]
