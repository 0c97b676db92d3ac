"""An LM head and its rows on the CPU: tile after tile of columns, slab after slab of rows.

Logits exist for one tile of `TILE` columns at a time. What a slab may keep are exponentials, from
which `_core.logit_gradient` makes the gradient of the logits once the coefficients are known; so
they are computed once. csrc/cpu/loss.h says what the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.linear_token_stats.bans import Bans
from eapo_fast.kernels.linear_token_stats.coefficients import (
    Coefficients,
    compacted,
    filled_up,
    pieces,
    spans,
)
from eapo_fast.kernels.linear_token_stats.cpu_truncation import (
    ROWS,
    Exponentials,
    Truncation,
    truncated,
    truncated_gradient,
)
from eapo_fast.kernels.linear_token_stats.gradients import Gradients
from eapo_fast.kernels.linear_token_stats.memory import Workspace
from eapo_fast.kernels.linear_token_stats.products import Centres, Products, products_for
from eapo_fast.kernels.native import follow_torch_threads
from eapo_fast.kernels.truncated_entropy.reference import Cut

TILE = 2 * _core.LOSS_BLOCK
"""Columns of logits that exist at once: what stays in the last-level cache, at full GEMM speed."""
BLOCK_ROWS = 1024
"""Rows of logits that exist at once: enough to read the weight at a small share of the time."""
SLAB_BYTES = 40 << 20
"""Memory of a slab that keeps its exponentials, ..."""
MOST_SLAB_BYTES = 320 << 20
"""... unless they would be of fewer than `BLOCK_ROWS` rows: then up to so much."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """R rows, and what is known of them."""

    hidden: Tensor
    """[R, H] contiguous"""
    targets: Tensor
    """[R]"""
    state: Tensor
    """[R, LOSS_STATE] statistics"""
    centres: Centres | None
    """Where the products place the logits."""
    bans: tuple[Tensor | None, Tensor | None]
    """Starts and ids, as `Bans.of` gives them."""

    def __len__(self) -> int:
        return len(self.targets)


class CpuHead:
    """Statistics of n rows and their gradients, in float32; `Head` says what the logits are.

    `read` fills `logprob` and `entropy`, `push` and `replay` add to the gradients that are wanted.
    `guess` [n], if set: log-probabilities close to those to be found; they sharpen bfloat16 logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        vocab_size: int,
        banned: tuple[Tensor, Tensor] | None,
        chunk_size: int | None,
        wanted: tuple[bool, bool, bool] = (False, False, False),
        state: Tensor | None = None,
    ) -> None:
        follow_torch_threads()
        self.products: Products = products_for(hidden.dtype)
        self.source, self.weight, self.targets = hidden.contiguous(), weight.contiguous(), targets
        self.bias = None if bias is None else bias.float().contiguous()
        self.temperature, self.softcap = temperature, softcap or 0.0
        self.vocab, self.chunk_size = vocab_size, chunk_size
        self.bans = None if banned is None else Bans(banned, len(hidden))
        self.guess: Tensor | None = None
        self.truncation: Cut | None = None
        """If set: of the truncated entropy and mass [n] that `read` then fills in."""
        self.truncated: Tensor | None = None
        self.kept_mass: Tensor | None = None
        self._cut: Truncation | None = None
        self.state = _blank_state(len(hidden)) if state is None else state
        self.logprob = torch.empty(len(hidden))
        self.entropy = torch.empty_like(self.logprob)
        inputs = (self.source, self.weight, bias)
        self.totals = Gradients(inputs, wanted, vocab_size, self.products)
        self._workspace = Workspace()
        self._kept: list[Exponentials] = []

    def slab_rows(self, *, keep: bool) -> int:
        """Return how many rows a slab has that keeps its exponentials, or does not."""
        if self.chunk_size is not None:
            return self.chunk_size
        if not keep:
            return self._block_rows
        size, tile = self.products.storage.itemsize, min(TILE, self.vocab)
        fixed, row = 0, size * self.vocab
        if not self.products.in_place:  # logits of a block, and a transposed copy of a tile
            fixed, row = size * self._block_rows * tile, row + size * tile
        least = min(self._block_rows, MOST_SLAB_BYTES // (size * self.vocab))
        return max(1, least, (SLAB_BYTES - fixed) // row)

    @property
    def _block_rows(self) -> int:
        """Rows of logits that exist at once; fewer where a product makes its own tensor."""
        return BLOCK_ROWS if self.products.in_place else BLOCK_ROWS // 2

    def read(self, start: int, stop: int, *, keep: bool, powers: bool = False) -> None:
        """Compute the statistics of rows start ... stop; `push` needs `keep`."""
        self._kept = []
        if self.truncation is not None and not keep:
            for first, last in spans(stop - start, self.slab_rows(keep=True), even=False):
                self.read(start + first, start + last, keep=True, powers=powers)
            self._kept = []
            return
        if keep:
            self._kept = [
                Exponentials(room, self._references(room), columns)
                for columns, room in self._tiles(stop - start, keep=True)
            ]
        for first, last in spans(stop - start, self._block_rows, even=self.chunk_size is None):
            block = self._block(slice(start + first, start + last))
            if keep:
                for left in self._kept:
                    out = left.tile[first:last], left.references[first:last]
                    self._take(block, left.columns, out[0], powers, out)
            else:
                for columns, room in self._tiles(len(block), keep=False):
                    self._take(block, columns, room, powers, (None, None))
        top, mass, moment, target, *_ = self.state[start:stop].unbind(1)
        log_mass = mass.log()
        self.logprob[start:stop] = target - top - log_mass
        self.entropy[start:stop] = log_mass - moment / mass
        if keep and self.truncation is not None:
            self._truncate(self.truncation, start, stop)

    def push(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, the last ones read, given their coefficients.

        Rows whose coefficients are 0 take no part.
        """
        rows, active = slice(start, stop), self._active(slopes)
        source = torch.arange(stop - start) if active is None else compacted(active)
        if not len(source):
            return
        where = rows if active is None else start + source
        own = slopes.of(source)
        with self.totals.of_rows(where) as total:
            for left in self._kept:
                dz = self._slab_gradient(left, rows, source, own)
                total.add(dz, left.columns)

    def replay(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, read before, computing their logits again."""
        if slopes.c is not None:
            for first, last in spans(stop - start, self.slab_rows(keep=True), even=False):
                self.state[start + first : start + last] = _blank_state(last - first)
                self.read(start + first, start + last, keep=True)
                self.push(start + first, start + last, slopes.of(slice(first, last)))
            return
        active = self._active(slopes)
        rows = torch.arange(start, stop) if active is None else start + active
        for part in pieces(rows, self.slab_rows(keep=False)):
            block, own, every = self._block(part), slopes.of(part - start), torch.arange(len(part))
            with self.totals.of_rows(part) as total:
                for columns, room in self._tiles(len(part), keep=False):
                    logits = self._logits(block, columns, room)
                    left = Exponentials(logits, self._references(logits), columns)
                    out = (logits, left.references)
                    self._absorb(block, logits, columns, None, False, out)
                    dz = self._differentiate(left, block.state, block.targets, every, own)
                    total.add(dz, columns)

    def scale_hidden(self, factors: Tensor) -> None:
        """Multiply the gradient of each hidden state by its factor [n]."""
        self.totals.scale_hidden(factors)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden, weight and bias, rounded once; None where not wanted."""
        return self.totals.rounded()

    def extra(self, name: str) -> Tensor:
        """Return a further statistic [n] of rows read with `powers`."""
        _, mass, _, _, mass2, mass3 = self.state.unbind(1)
        found = {
            "max_logprob": -mass.log(),
            "p_max": 1 / mass,
            "sum_p2": mass2 / mass**2,
            "sum_p3": mass3 / mass**3,
            "kept_mass": self.kept_mass,
            "truncated_entropy": self.truncated,
        }[name]
        return self.logprob if found is None else found  # None: no rows were read

    def _truncate(self, cut: Cut, start: int, stop: int) -> None:
        if self.truncated is None or self.kept_mass is None:
            self.truncated = torch.empty_like(self.logprob)
            self.kept_mass = torch.empty_like(self.logprob)
        self._cut = truncated(cut, self._kept, self.state[start:stop])
        self.kept_mass[start:stop] = self._cut.mass
        self.truncated[start:stop] = self._cut.entropy

    def close(self) -> None:
        """Give memory back; the head is of no use afterwards."""
        self._kept = []
        self._workspace.close()

    def _active(self, slopes: Coefficients) -> Tensor | None:
        """Return the rows with a gradient and a few without, as products want them; None: all."""
        active = slopes.active()
        if active is None or not len(active):
            return active
        return filled_up(active, len(slopes.a), self.products.rows)

    def _block(self, rows: slice | Tensor) -> Block:
        hidden, targets = self.source[rows], self.targets[rows]
        guess = None if self.guess is None else self.guess[rows]
        return Block(
            hidden=hidden,
            targets=targets,
            state=self.state[rows],
            centres=self.products.centres(hidden, self.weight, targets, guess),
            bans=(None, None) if self.bans is None else self.bans.of(rows),
        )

    def _tiles(self, rows: int, *, keep: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield the tiles and room [R, W] for each: of its own if they are to be kept."""
        size = rows * (self.vocab if keep else min(TILE, self.vocab))
        buffer = self._workspace.room(size, self.products.storage)
        for start in range(0, self.vocab, TILE):
            width = min(TILE, self.vocab - start)
            offset = rows * start if keep else 0
            room = buffer[offset : offset + rows * width].view(rows, width)
            yield slice(start, start + width), room

    def _references(self, tile: Tensor) -> Tensor:
        return torch.empty(len(tile), -(-tile.shape[1] // _core.LOSS_BLOCK))

    def _logits(self, block: Block, columns: slice, out: Tensor) -> Tensor:
        return self.products.logits(block.hidden, self.weight[columns], block.centres, out)

    def _take(
        self,
        block: Block,
        columns: slice,
        room: Tensor,
        powers: bool,
        out: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Make the logits of a tile and absorb them: at most one such tensor is alive."""
        logits = self._logits(block, columns, room)
        self._absorb(block, logits, columns, block.state, powers, out)

    def _absorb(
        self,
        block: Block,
        logits: Tensor,
        columns: slice,
        state: Tensor | None,
        powers: bool,
        out: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Take the logits of a tile into `state`, and put exponentials and references in `out`."""
        _core.absorb_logits(
            logits,
            column=columns.start,
            targets=block.targets,
            bias=None if self.bias is None else self.bias[columns],
            shift=None if block.centres is None else block.centres.middle,
            own=None if block.centres is None else block.centres.own,
            temperature=self.temperature,
            softcap=self.softcap,
            ban_starts=block.bans[0],
            ban_ids=block.bans[1],
            state=state,
            powers=powers,
            out=out[0],
            references=out[1],
        )

    def _slab_gradient(
        self, left: Exponentials, slab: slice, source: Tensor, slopes: Coefficients
    ) -> Tensor:
        """Return the gradients [K, W] of rows `source` of a slab that was read with `keep`."""
        state, targets = self.state[slab], self.targets[slab]
        if slopes.c is None:
            return self._differentiate(left, state, targets, source, slopes)
        assert self._cut is not None
        settings = (self.temperature, self.softcap)
        for part in torch.arange(len(source)).split(ROWS):  # in order: see `compacted`
            own, some = source[part], slopes.of(part)
            assert some.c is not None
            further = truncated_gradient(self._cut, left, state, own, some.c, *settings)
            self._differentiate(left, state, targets, own, some, target=part)
            left.tile[part[0] : part[-1] + 1] += further
        return left.tile[: len(source)]

    def _differentiate(
        self,
        left: Exponentials,
        state: Tensor,
        targets: Tensor,
        source: Tensor,
        slopes: Coefficients,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return the gradients [K, W] of rows `source`, in the place of the exponentials.

        `target` [K]: the rows that they become; None: the first K.
        """
        _core.logit_gradient(
            left.tile,
            column=left.columns.start,
            references=left.references,
            state=state,
            targets=targets,
            source=source,
            target=torch.arange(len(source)) if target is None else target,
            a=slopes.a.float(),
            b=None if slopes.b is None else slopes.b.float(),
            temperature=self.temperature,
            softcap=self.softcap,
        )
        return left.tile[: len(source)]


def _blank_state(rows: int) -> Tensor:
    state = torch.zeros(rows, _core.LOSS_STATE, dtype=torch.float64)
    state[:, 0] = -torch.inf
    return state
