"""An LM head on a GPU whose matrix products are those of torch's library (cuBLAS).

The library has to be told how many rows to multiply, so the host has to know: `RowList`. Logits are
float32 sums of products, not rounded; their gradient takes the front half of a row's own memory in
bfloat16, which is what the library multiplies, and sums over rows are float32. Between the products
it is the Triton head, launch for launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats import cuda_rows
from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead
from eapo_fast.kernels.linear_token_stats.triton_row_pass import Span
from eapo_fast.kernels.native import triton_refusal

LEAST_SLAB_BYTES, MOST_SLAB_BYTES = 1 << 28, 5 << 30
"""Bounds of the memory of a slab of logits; 5 GiB are 8192 rows of 152k columns."""
MEMORY_SHARE = 28
"""A slab takes at most this part of the GPU's memory. It depends on nothing else, so that the same
machine cuts the same slabs again."""
ROWS_IN_CUDA = False
"""Whether the CUDA kernel takes the rows that it can, which reads them once; not measured yet."""
_PART = 16_384
"""Rows of a sum that are multiplied at a time where the library cannot add."""
_ALIGNED = 8
"""Distances of rows are multiples of this many logits, which the library's fast products want."""


@dataclass(frozen=True, slots=True, eq=False)
class RowList:
    """The masked-in rows of a batch, and what the host knows about them."""

    rows: Tensor
    """[N] those that may have a gradient, then the other masked-in ones, then the rest."""
    count: Tensor
    """[1] masked-in rows, on the device."""
    known: int
    """The same number."""
    moving: int
    """Rows that may have a gradient."""
    lengths: list[int]
    """Rows of each sequence that has such ones, in the order of the list; for a recipe of single
    tokens it stays empty."""
    in_order: bool
    """Whether the list is 0 ... N - 1."""


def library_refusal(hidden: Tensor) -> str | None:
    """Return why this head cannot run on hidden states, or None."""
    if hidden.dtype == torch.float16:
        return "gradients of logits are too small for float16 products; take 'triton'"
    if not hasattr(torch.ops.aten.mm, "dtype_out"):
        return f"its products need torch 2.8 or newer, got {torch.__version__}"
    if hidden.device.type == "cuda" and torch.version.cuda is None:
        return "its products are cuBLAS's"
    if hidden.device.type == "cuda" and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "its products need compute capability 8.0 or newer"
    return triton_refusal(hidden, (torch.float32, torch.bfloat16))


class LibraryHead(TritonHead):
    """Statistics of n rows and their gradients; what `TritonHead` does, for rows that are counted.

    Raises nothing of its own: `library_refusal` says before what it does not take.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        lists: RowList | None = None,
        wanted: tuple[bool, bool, bool] = (False, False, False),
        **settings: Any,
    ) -> None:
        self._lists = lists
        super().__init__(
            hidden,
            weight,
            targets,
            wanted=wanted,
            live=None if lists is None else (lists.rows, lists.count),
            **settings,
        )
        if wanted[0] and wanted[1]:
            self.of_hidden = torch.zeros_like(self.source)  # each row is written once
        self._own = self.source
        self._has_weight = False

    @property
    def known(self) -> int:
        """How many rows there are in the list."""
        return len(self.targets) if self._lists is None else self._lists.known

    @property
    def moving(self) -> int:
        """How many of them, at its front, may have a gradient."""
        return self.known if self._lists is None else self._lists.moving

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence that may have a gradient; see `RowList`."""
        return [] if self._lists is None else self._lists.lengths

    def slab_bytes(self) -> int:
        """Return how much memory a slab may take."""
        if self.source.device.type != "cuda":
            return LEAST_SLAB_BYTES
        memory = torch.cuda.get_device_properties(self.source.device).total_memory
        return min(max(memory // MEMORY_SHARE, LEAST_SLAB_BYTES), MOST_SLAB_BYTES)

    def accumulate(self, span: Span) -> None:
        """Add what the logit gradients of the rows of a slab contribute to each gradient."""
        slopes, weight = self._slopes(span.size), self.weight[: self.vocab]
        if self.of_hidden is not None:
            found = torch.empty(span.size, weight.shape[1], device=weight.device)
            multiply(slopes, weight, found)
            self._write_hidden(span, found)
        if self.of_weight is not None:
            multiply(slopes.T, self._own[: span.size], self.of_weight[: self.vocab],
                     add=self._has_weight)  # fmt: skip
            self._has_weight = True
        if self.of_bias is not None:
            self.of_bias[: self.vocab] += slopes.sum(0, dtype=torch.float32)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden, weight and bias, rounded once; None where not wanted."""
        if self.of_weight is not None and not self._has_weight:
            self.of_weight.zero_()
        return super().gradients()

    def _weight_sum(self) -> Tensor:
        """Return where the gradient of the weight is summed up: the first product writes it."""
        padded = self.weight.shape[0] > self.vocab
        make = torch.zeros if padded else torch.empty
        return make(self.weight.shape, device=self.weight.device)

    def _write_hidden(self, span: Span, found: Tensor) -> None:
        assert self.of_hidden is not None
        stop = span.start + span.size
        if self._in_order():
            self.of_hidden[span.start : stop] = found
        else:
            rows = self.rows[span.start : stop]
            self.of_hidden.index_copy_(0, rows, found.to(self.of_hidden.dtype))

    def _in_order(self) -> bool:
        return self._lists is None or self._lists.in_order

    def _logits(self, span: Span) -> None:
        """Make the logits of the rows of a slab."""
        if self._slab is None or len(self._slab) < span.size:
            width = -(-self.vocab // _ALIGNED) * _ALIGNED
            rows = max(span.size, self.slab_rows(keep=True))  # once, for later spans too
            self._slab = None  # before there are two
            self._slab = torch.empty(rows, width, device=self.source.device)
        stop = span.start + span.size
        if self._in_order():
            self._own = self.source[span.start : stop]
        else:
            self._own = self.source.index_select(0, self.rows[span.start : stop])
        multiply(self._own, self.weight[: self.vocab].T, self._slab[: span.size, : self.vocab])

    def _run(
        self,
        span: Span,
        *,
        program: dict[str, Any] | None,
        statistics: bool,
        powers: bool,
        gradient: bool,
    ) -> None:
        """Make statistics and gradients of the rows of a slab; those without one become 0."""
        assert self._slab is not None
        logits = self._slab[: span.size, : self.vocab]
        out = self._slopes(span.size) if gradient else logits
        if ROWS_IN_CUDA and not powers and cuda_rows.pass_refusal(self, logits) is None:
            cuda_rows.launch(
                self,
                logits,
                out,
                span,
                program=program,
                statistics=statistics,
                gradient=gradient,
                zeros=True,
            )
            return
        self.launch(logits, out, span, program=program, statistics=statistics, powers=powers,
                    gradient=gradient, zeros=True)  # fmt: skip

    def _slopes(self, rows: int) -> Tensor:
        """Return where the gradients of a slab's logits are, in the dtype of products."""
        assert self._slab is not None
        return self._slab[:rows].view(self.source.dtype)[:, : self.vocab]


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write, or `add`, left @ right to `out`, which may be float32 where they are bfloat16.

    Products are summed in float32 and not rounded on their way to a float32 `out`.
    """
    kind = out.dtype
    if left.dtype == kind:
        (torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out))
    elif out.device.type != "cuda":
        found = torch.mm(left.to(kind), right.to(kind), out=torch.empty_like(out))
        (out.add_(found) if add else out.copy_(found))
    elif not add:
        torch.mm(left, right, out_dtype=kind, out=out)
    elif _adds_in_float32(out.device):
        torch.addmm(out, left, right, out_dtype=kind, out=out)
    else:
        for rows, total in zip(left.split(_PART), out.split(_PART), strict=True):
            total += torch.mm(rows, right, out_dtype=kind)


@cache
def _adds_in_float32(device: torch.device) -> bool:
    """Return whether this torch adds a product of bfloat16 numbers to float32 ones; it is tried."""
    total = torch.zeros(16, 16, device=device)
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
