"""An LM head and its rows in Triton: slabs of float32 logits, lists of rows kept on the device.

A slab is three launches forward (logits, rows, and with gradients the list of rows that have one)
and two more for the gradients. Nothing waits for the GPU: which rows take part is known to it
alone. Once compiled for a head, no length compiles anything again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats import triton_products as products
from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients
from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass, Span

SLAB_BYTES = 5 << 29
"""Memory of a slab of logits: 4096 rows of 152k columns; the larger, the fewer sums of the weight's
gradient are read and written."""


class TritonHead(RowPass):
    """Statistics of n rows and their gradients, in float32; `Head` says what the logits are."""

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
        super().__init__(
            targets,
            vocab_size=vocab_size,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            banned=banned,
            state=state,
            live=live,
        )
        self.source, self.weight = hidden.contiguous(), weight.contiguous()
        self.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        self.chunk_size, self.wanted = chunk_size, wanted
        self.of_hidden = _zeros(wanted[0], hidden)
        self.of_weight = self._weight_sum() if wanted[1] else None
        self.of_bias = None if bias is None else _zeros(wanted[2], bias)
        self._slab: Tensor | None = None

    @property
    def known(self) -> int:
        """How many rows there are at most in the list, as far as the host knows."""
        return len(self.targets)

    @property
    def moving(self) -> int:
        """How many of them, at its front, may have a gradient."""
        return self.known

    def slab_rows(self, *, keep: bool) -> int:
        """Return how many rows of logits are made at once."""
        most = max(1, self.slab_bytes() // (4 * self.vocab))
        return min(self.chunk_size or most, max(1, self.known))

    def slab_bytes(self) -> int:
        """Return how much memory a slab may take."""
        return SLAB_BYTES

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
        self,
        span: Span,
        *,
        powers: bool = False,
        program: dict[str, Any] | None = None,
        gradient: bool = True,
    ) -> None:
        """Compute the statistics of the rows of a slab, and keep their logits.

        `program`: arguments of `run_rows`; makes coefficients, and, if `gradient`, logit gradients
        in the same launch, for `accumulate`.
        """
        self._logits(span)
        self._run(span, program=program, statistics=True, powers=powers,
                  gradient=gradient and program is not None)  # fmt: skip

    def replay_span(self, span: Span) -> None:
        """Add the gradients of rows read before by `a`, `b` and `c`; computes logits again."""
        self._logits(span)
        self.differentiate(span)

    def differentiate(self, span: Span) -> None:
        """Turn the logits of rows into gradients by `a`, `b` and `c`, and add them."""
        self._run(span, program=None, statistics=False, powers=False, gradient=True)
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

    def close(self) -> None:
        """Give the memory of the slab back; gradients and statistics stay."""
        super().close()
        self._slab = None

    def _weight_sum(self) -> Tensor:
        """Return where the gradient of the weight is summed up."""
        return torch.zeros(self.weight.shape, device=self.weight.device)

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

    def _run(
        self,
        span: Span,
        *,
        program: dict[str, Any] | None,
        statistics: bool,
        powers: bool,
        gradient: bool,
    ) -> None:
        """Make statistics, and gradients of the logits in their place, of the rows of a slab."""
        assert self._slab is not None
        self.launch(self._slab, self._slab, span, program=program, statistics=statistics,
                    powers=powers, gradient=gradient)  # fmt: skip


def _zeros(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.zeros(like.shape, device=like.device) if wanted else None
