"""Rows of logits in Triton: their statistics, the token program, and the gradient.

Which rows take part is a list on the device, whose length only the device has to know.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.triton_rows import STATE, run_rows
from eapo_fast.kernels.truncated_entropy.reference import Cut

ROOM = 1024
"""Tokens near the border of a cut that are put aside."""
SPAN = 512
"""Columns at once while the border is sought: their sums above eight numbers fill registers."""
VECTORS = ("old_logprob", "advantages", "weights", "factor", "ref_logprob")
"""Arguments of the token program by row; see `run_rows`."""
NUMBERS = ("least", "most", "delta", "beta", "entropy_coef")
"""Arguments of the token program for all rows."""
NO_PROGRAM: dict[str, Any] = {
    "PROGRAM": False,
    "SURROGATE": 0,
    "KL": 0,
    "FACTOR": False,
    "REFERENCE": False,
    "BETA": False,
    "BONUS": False,
}


class Shape(NamedTuple):
    """How a program goes through its row; none of it changes what comes out but for rounding."""

    block: int
    """Columns at once."""
    warps: int
    stages: int
    """Blocks that are on their way at a time while statistics are made."""


SHAPES = {4: Shape(4096, 8, 3), 2: Shape(8192, 32, 4)}
"""By bytes of a logit; not tuned. Rows of 2-byte logits are read by one program a multiprocessor,
so that all rows that are being read (132 of 304 KB on an H200) may find room in its level-2 cache
for their second read; those of float32 would not."""


class Span(NamedTuple):
    """Rows of a slab, as a part of the list of rows."""

    edges: Tensor
    """[2] int64 on the device: where it starts and stops."""
    size: int
    """How many rows it has at most."""
    start: int = 0
    """Where it starts, if the host knows."""


class RowPass:
    """n rows of logits and what is known about them, in float32.

    `live`: (rows [n], count [1]) as `listed` gives them; spans, and positions start ... stop of
    the methods, count along that list, and what is behind its end is left alone. Statistics and
    coefficients are by row.
    """

    def __init__(
        self,
        targets: Tensor,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        bias: Tensor | None = None,
        softcap: float | None = None,
        banned: tuple[Tensor, Tensor] | None = None,
        state: Tensor | None = None,
        live: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        count, device = len(targets), targets.device
        self.targets, self.vocab = targets.contiguous(), vocab_size
        self.temperature, self.softcap = temperature, softcap
        self.bias = None if bias is None else bias.float().contiguous()
        self.bans = _sorted(banned, count) if banned is not None and len(banned[0]) else None
        self.rows, self.count = live or (
            torch.arange(count, device=device),
            torch.full((1,), count, device=device),
        )
        self.state = torch.zeros(count, STATE, device=device) if state is None else state
        # Memory of its own for each: an address off 16 bytes would compile another variant.
        vectors = [torch.zeros(count, device=device) for _ in range(6)]
        self.logprob, self.entropy, self.a, self.b, self.c, self.losses = vectors
        self.truncation: Cut | None = None
        """If set: a cut, whose mass and entropy `extra` then has; c is of that entropy."""
        self._aside: tuple[Tensor, Tensor] | None = None

    def span(self, start: int, stop: int) -> Span:
        """Return rows start ... stop, those of them that are in the list."""
        ends = torch.arange(start, stop + 1, max(1, stop - start), device=self.count.device)
        return Span(torch.minimum(ends, self.count), stop - start, start)

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

    def take(self, a: Tensor, b: Tensor, c: Tensor | None) -> None:
        """Set the coefficients of all rows [n]; None stands for 0."""
        self.a.copy_(a)
        self.b.copy_(b)
        if c is not None:
            self.c.copy_(c)

    def close(self) -> None:
        """Give memory back that only launches need."""
        self._aside = None

    def launch(
        self,
        logits: Tensor,
        out: Tensor,
        span: Span,
        *,
        program: dict[str, Any] | None = None,
        statistics: bool,
        gradient: bool,
        powers: bool = False,
        zeros: bool = False,
        given: bool = False,
    ) -> None:
        """Run the rows of a span; see `run_rows`.

        `logits` and `out` [C or N, V]: their rows lie at one distance and are packed. `program`:
        its arguments; makes coefficients, and gradients in the same launch.
        """
        program = dict(program or NO_PROGRAM)
        vectors = [program.pop(name, self.a) for name in VECTORS]
        numbers = [program.pop(name, 0.0) for name in NUMBERS]
        cut = self.truncation or Cut()
        search = cut.top_p is not None or cut.top_k is not None
        aside, names = self._room(span.size) if search else (self.a, self.rows)
        starts, ids = self.bans or (self.rows, self.rows)
        shape = SHAPES[logits.element_size()]
        block = min(shape.block, triton.next_power_of_2(self.vocab))
        launch: Any = run_rows[(span.size,)]
        launch(
            logits,
            out,
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
            logits.stride(0),
            out.stride(0),
            self.vocab,
            1.0 / self.temperature,
            self.softcap or 0.0,
            *numbers,
            math.inf if cut.top_p is None else float(cut.top_p),
            math.inf if cut.top_k is None else float(cut.top_k),
            math.log(cut.min_p) if cut.min_p else -math.inf,
            STATISTICS=statistics,
            GRADIENT=gradient,
            ZEROS=zeros,
            GIVEN=given,
            POWERS=powers,
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
            STAGES=shape.stages,
            num_warps=shape.warps if block >= 2048 else 4,
            **program,
        )

    def _room(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return room for the tokens near the borders of the rows of a slab."""
        if self._aside is None or len(self._aside[0]) < rows:
            device = self.targets.device
            self._aside = (
                torch.empty(rows, ROOM, device=device),
                torch.empty(rows, ROOM, dtype=torch.int32, device=device),
            )
        return self._aside


def _sorted(banned: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Order (rows, ids) by row: starts [n + 1] and ids [B]."""
    where, order = banned[0].long().sort(stable=True)
    starts = torch.searchsorted(where, torch.arange(rows + 1, device=where.device))
    return starts, banned[1].long()[order]
