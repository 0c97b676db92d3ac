"""Derivatives of a loss in the statistics of its rows, and which rows have any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """dloss/d(...) of R rows; None stands for 0."""

    a: Tensor
    """[R] log-probability."""
    b: Tensor | None = None
    """[R] entropy."""
    c: Tensor | None = None
    """[R] truncated entropy."""

    def of(self, rows: Tensor | slice) -> Coefficients:
        """Return those of some of the rows."""
        return Coefficients(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def active(self) -> Tensor | None:
        """Return the indices of rows with a coefficient that is not 0; None: take all.

        On a GPU that is always None: the length of a list is not known there without waiting.
        """
        if self.a.device.type != "cpu":
            return None
        active = torch.stack([x != 0 for x in self if x is not None]).any(0)
        return None if active.all() else active.nonzero().squeeze(1)


def filled_up(active: Tensor, rows: int, multiple: int) -> Tensor:
    """Add other ones of `rows` rows to a list, so that its length is a multiple if it can be."""
    lacking = min(-len(active) % multiple, rows - len(active))
    if not lacking:
        return active
    idle = torch.ones(rows, dtype=torch.bool)
    idle[active] = False
    return torch.cat([active, idle.nonzero()[:lacking, 0]]).sort()[0]


def compacted(active: Tensor) -> Tensor:
    """Return which row goes where [K] so that the K active ones come first and few have to move.

    A row that is among the first K stays where it is; the others fill the gaps.
    """
    count = len(active)
    source = torch.arange(count)
    gap = torch.ones(count, dtype=torch.bool)
    gap[active[active < count]] = False
    source[gap] = active[active >= count]
    return source


def pieces(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Cut a list of rows into as few parts of at most `size` as there can be, of equal length."""
    count = -(-len(rows) // size)
    return iter(rows.tensor_split(count)) if count else iter(())


def spans(count: int, size: int, *, even: bool) -> Iterator[tuple[int, int]]:
    """Cut `count` rows into (start, stop) of at most `size` rows; `even`: of about equal length."""
    if even and count:
        size = -(-count // -(-count // size))
    for start in range(0, count, size):
        yield start, min(start + size, count)
