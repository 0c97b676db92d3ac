"""Slabs cut on sequence boundaries, by a device that alone knows where those are.

Its host launches as many slabs as there can be; those behind the last one are empty, and what is
launched for them leaves at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.triton_row_pass import Span


@triton.jit(do_not_specialize=["sequences", "most", "slabs", "pieces"])
def cut_slabs(  # type: ignore[no-untyped-def]
    starts,  # [S + 1] int64: where in the list of rows each sequence starts, and the end
    whole,  # [slabs, 2] int64: slabs of whole sequences
    parts,  # [pieces, 2] int64: pieces of sequences that are too long for one
    sequences,
    most,
    slabs,
    pieces,
):
    """Pack sequences in order; what is left of both lists becomes empty spans."""
    end = tl.load(starts + sequences)
    first = tl.zeros([], tl.int64)
    last = tl.zeros([], tl.int64)
    slab = 0
    piece = 0
    for i in range(0, sequences + 1):
        stop = end
        if i < sequences:
            stop = tl.load(starts + i + 1)
        full = (stop - first > most) | (i == sequences)
        if full & (last > first):
            if last - first > most:
                while first < last:
                    tl.store(parts + 2 * piece, first)
                    first = tl.minimum(first + most, last)
                    tl.store(parts + 2 * piece + 1, first)
                    piece += 1
            else:
                tl.store(whole + 2 * slab, first)
                tl.store(whole + 2 * slab + 1, last)
                slab += 1
            first = last
        last = stop
    for i in range(slab, slabs):
        tl.store(whole + 2 * i, end)
        tl.store(whole + 2 * i + 1, end)
    for i in range(piece, pieces):
        tl.store(parts + 2 * i, end)
        tl.store(parts + 2 * i + 1, end)


class Slabs(NamedTuple):
    """Where a list of rows is cut, some spans of both kinds empty."""

    whole: list[Span]
    """Whole sequences."""
    parts: list[Span]
    """Pieces of sequences that are longer than a slab."""


def sequence_slabs(cu_seqlens: Tensor, mask: Tensor | None, most: int, total: int) -> Slabs:
    """Cut the list of masked-in rows of `total` into slabs of at most `most`, without waiting.

    Two slabs in a row hold more than `most` rows together, so that there are few.
    """
    starts = cu_seqlens.long()
    if mask is not None:
        before = torch.cat([starts.new_zeros(1), (mask != 0).long().cumsum(0)])
        starts = before[starts]
    slabs, pieces = 2 * (total // most) + 1, 2 * (total // (most + 1))
    edges = [starts.new_zeros(max(1, count), 2) for count in (slabs, pieces)]
    launch: Any = cut_slabs[(1,)]
    launch(starts.contiguous(), *edges, len(starts) - 1, most, slabs, pieces, num_warps=1)
    whole, parts = ([Span(x, most) for x in found.unbind()] for found in edges)
    return Slabs(whole, parts if pieces else [])
