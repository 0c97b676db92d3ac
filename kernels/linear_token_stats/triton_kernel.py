"""An LM head and its rows in Triton: slabs of float32 logits, lists of rows kept on the device.

A slab is three launches forward (logits, rows, and with gradients the list of rows that have one)
and two more for the gradients. Nothing waits for the GPU: which rows take part is known to it
alone. Once compiled for a head, no length compiles anything again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from eapo_fast.kernels.linear_token_stats import triton_products as products
from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients
from eapo_fast.kernels.linear_token_stats.triton_rows import STATE, run_rows
from eapo_fast.kernels.truncated_entropy.reference import Cut

SLAB_BYTES = 5 << 29
"""Memory of a slab of logits: 4096 rows of 152k columns; the larger, the fewer sums of the weight's
gradient are read and written."""
MOST_BLOCK = 4096
"""Columns of a row at once."""
ROOM = 1024
"""Tokens near the border of a cut that are put aside."""
SPAN = 512
"""Columns at once while the border is sought: their sums above eight numbers fill registers."""

NO_PROGRAM: dict[str, Any] = {
    "PROGRAM": False,
    "SURROGATE": 0,
    "KL": 0,
    "FACTOR": False,
    "REFERENCE": False,
    "BETA": False,
    "BONUS": False,
}


class Span(NamedTuple):
    """Rows of a slab, as a part of the list of rows."""

    edges: Tensor
    """[2] int64 on the device: where it starts and stops."""
    size: int
    """How many rows it has at most."""


class TritonHead:
    """Statistics of n rows and their gradients, in float32; `Head` says what the logits are.

    `live`: (rows [n], count [1]) as `triton_products.listed` gives them; spans, and positions
    start ... stop of the methods, count along that list, and what is behind its end is left alone.
    Statistics and coefficients are by row.
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
        live: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        count, device = len(hidden), hidden.device
        self.source, self.weight = hidden.contiguous(), weight.contiguous()
        self.targets = targets
        self.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        self.bias = None if bias is None else bias.float().contiguous()
        self.temperature, self.softcap, self.vocab = temperature, softcap, vocab_size
        self.chunk_size, self.wanted = chunk_size, wanted
        self.rows, self.count = live or (
            torch.arange(count, device=device),
            torch.full((1,), count, device=device),
        )
        self.bans = None if banned is None else _sorted(banned, count)
        self.state = hidden.new_zeros(count, STATE, dtype=torch.float32) if state is None else state
        # Memory of its own for each: an address off 16 bytes would compile another variant.
        vectors = [torch.zeros(count, device=device) for _ in range(6)]
        self.logprob, self.entropy, self.a, self.b, self.c, self.losses = vectors
        self.of_hidden = _zeros(wanted[0], hidden)
        self.of_weight = _zeros(wanted[1], weight)
        self.of_bias = None if bias is None else _zeros(wanted[2], bias)
        self._slab: Tensor | None = None
        self._aside: tuple[Tensor, Tensor] | None = None
        self.truncation: Cut | None = None
        """If set: a cut, whose mass and entropy `extra` then has; c is of that entropy."""

    def slab_rows(self, *, keep: bool) -> int:
        """Return how many rows of logits are made at once."""
        most = max(1, SLAB_BYTES // (4 * self.vocab))
        return min(self.chunk_size or most, max(1, len(self.targets)))

    def span(self, start: int, stop: int) -> Span:
        """Return rows start ... stop, those of them that are in the list."""
        ends = torch.arange(start, stop + 1, max(1, stop - start), device=self.count.device)
        return Span(torch.minimum(ends, self.count), stop - start)

    def read(self, start: int, stop: int, *, keep: bool, powers: bool = False) -> None:
        """Compute the statistics of rows start ... stop; `push` needs `keep`."""
        self.read_span(self.span(start, stop), powers=powers)

    def push(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, the last ones read, given their slopes."""
        self._set(start, stop, slopes)
        self.differentiate(self.span(start, stop))

    def replay(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, read before, computing their logits again."""
        self._set(start, stop, slopes)
        size = self.slab_rows(keep=False)
        for first in range(start, stop, size):
            self.replay_span(self.span(first, min(first + size, stop)))

    def read_span(
        self, span: Span, *, powers: bool = False, program: dict[str, Any] | None = None
    ) -> None:
        """Compute the statistics of the rows of a slab, and keep their logits.

        `program`: arguments of `run_rows`; makes coefficients and logit gradients in the same
        launch, for `accumulate`.
        """
        self._logits(span)
        self._run(span, program=program, STATISTICS=True, POWERS=powers,
                  GRADIENT=program is not None)  # fmt: skip

    def replay_span(self, span: Span) -> None:
        """Add the gradients of rows read before by `a`, `b` and `c`; computes logits again."""
        self._logits(span)
        self.differentiate(span)

    def differentiate(self, span: Span) -> None:
        """Turn the logits of rows into gradients by `a`, `b` and `c`, and add them."""
        self._run(span, program=None, STATISTICS=False, POWERS=False, GRADIENT=True)
        self.accumulate(span)

    def accumulate(self, span: Span) -> None:
        """Add what the logit gradients of the rows of a slab contribute to each gradient."""
        place = span.edges[0] + torch.arange(span.size, device=span.edges.device)
        own = self.rows[place.clamp(max=len(self.rows) - 1)]
        moves = (self.a[own] != 0) | (self.b[own] != 0) | (self.c[own] != 0)
        active, count = products.listed(moves & (place < span.edges[1]))
        slab, width = self._slab, self.source.shape[1]
        settings = products.settings(self.source.dtype, gradient=True)
        launch: Any
        if self.of_hidden is not None:
            launch = products.to_hidden[products.grid(span.size, width)]
            launch(slab, self.weight, self.rows, span.edges, active, count, self.of_hidden,
                   self.vocab, width, **settings)  # fmt: skip
        if self.of_weight is not None or self.of_bias is not None:
            launch = products.to_weight[
                products.grid(self.vocab, width if self.of_weight is not None else 1)
            ]
            launch(slab, self.source, self.rows, span.edges, active, count,
                   slab if self.of_weight is None else self.of_weight,
                   slab if self.of_bias is None else self.of_bias,
                   self.vocab, width, WEIGHT=self.of_weight is not None,
                   BIAS=self.of_bias is not None, **settings)  # fmt: skip

    def scale_hidden(self, factors: Tensor) -> None:
        """Multiply the gradient of each hidden state by its factor [n]."""
        assert self.of_hidden is not None
        self.of_hidden *= factors[:, None]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden, weight and bias, rounded once; None where not wanted."""
        hidden, weight, bias = (
            None if total is None or dtype is None else total.to(dtype)
            for total, dtype in zip(
                (self.of_hidden, self.of_weight, self.of_bias), self.dtypes, strict=True
            )
        )
        return hidden, weight, bias

    def extra(self, name: str) -> Tensor:
        """Return a further statistic [n] of rows read with `powers`."""
        _, mass, _, mass2, mass3, kept, moment, _, _ = self.state.unbind(1)
        return {
            "max_logprob": -mass.log(),
            "p_max": 1 / mass,
            "sum_p2": mass2 / mass**2,
            "sum_p3": mass3 / mass**3,
            "kept_mass": kept / mass,
            "truncated_entropy": torch.where(kept == 0, 0.0, kept.log() - moment / kept),
        }[name]

    def close(self) -> None:
        """Give memory back; the head is of no use afterwards."""
        self._slab = self._aside = None

    def take(self, a: Tensor, b: Tensor, c: Tensor | None) -> None:
        """Set the coefficients of all rows [n]; None stands for 0."""
        self.a.copy_(a)
        self.b.copy_(b)
        if c is not None:
            self.c.copy_(c)

    def _set(self, start: int, stop: int, slopes: Coefficients) -> None:
        own = self.rows[start:stop]
        self.a[own] = slopes.a.float()
        self.b[own] = torch.zeros_like(slopes.a) if slopes.b is None else slopes.b.float()
        self.c[own] = torch.zeros_like(slopes.a) if slopes.c is None else slopes.c.float()

    def _logits(self, span: Span) -> None:
        """Make the logits of the rows of a slab."""
        if self._slab is None or len(self._slab) < span.size:
            self._slab = torch.empty(span.size, self.vocab, device=self.source.device)
        launch: Any = products.logits[products.grid(span.size, self.vocab)]
        launch(self.source, self.weight, self.rows, span.edges, self._slab, self.vocab,
               self.source.shape[1],
               **products.settings(self.source.dtype, gradient=False))  # fmt: skip

    def _run(self, span: Span, *, program: dict[str, Any] | None, **constants: bool) -> None:
        program = dict(program or NO_PROGRAM)
        vectors = [program.pop(name, self.a) for name in VECTORS]
        numbers = [program.pop(name, 0.0) for name in NUMBERS]
        cut = self.truncation or Cut()
        search = cut.top_p is not None or cut.top_k is not None
        aside, names = self._room(span.size) if search else (self.a, self.rows)
        starts, ids = self.bans or (self.rows, self.rows)
        block = min(MOST_BLOCK, triton.next_power_of_2(self.vocab))
        launch: Any = run_rows[(span.size,)]
        launch(
            self._slab,
            self.rows,
            span.edges,
            self.targets,
            self.a if self.bias is None else self.bias,
            starts,
            ids,
            self.state,
            self.logprob,
            self.entropy,
            self.a,
            self.b,
            self.c,
            *vectors,
            self.losses,
            aside,
            names,
            self.vocab,
            1.0 / self.temperature,
            self.softcap or 0.0,
            *numbers,
            math.inf if cut.top_p is None else float(cut.top_p),
            math.inf if cut.top_k is None else float(cut.top_k),
            math.log(cut.min_p) if cut.min_p else -math.inf,
            BIAS=self.bias is not None,
            CAP=self.softcap is not None,
            BANS=self.bans is not None,
            STATE=STATE,
            CUT=self.truncation is not None,
            SEARCH=search,
            THIRD=self.truncation is not None,
            ROOM=ROOM,
            SPAN=SPAN,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
            **program,
            **constants,
        )

    def _room(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return room for the tokens near the borders of the rows of a slab."""
        if self._aside is None or len(self._aside[0]) < rows:
            device = self.source.device
            self._aside = (
                torch.empty(rows, ROOM, device=device),
                torch.empty(rows, ROOM, dtype=torch.int32, device=device),
            )
        return self._aside


VECTORS = ("old_logprob", "advantages", "weights", "factor", "ref_logprob")
"""Arguments of the token program by row; see `run_rows`."""
NUMBERS = ("least", "most", "delta", "beta", "entropy_coef")
"""Arguments of the token program for all rows."""


def _sorted(banned: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Order (rows, ids) by row: starts [n + 1] and ids [B]; none leaves room for one."""
    where, order = banned[0].long().sort(stable=True)
    starts = torch.searchsorted(where, torch.arange(rows + 1, device=where.device))
    ids = banned[1].long()[order]
    return starts, ids if len(ids) else ids.new_zeros(1)


def _zeros(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.zeros(like.shape, device=like.device) if wanted else None
