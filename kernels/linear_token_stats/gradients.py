"""Gradients of an LM head's inputs on the CPU, added up in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.linear_token_stats.products import Products


class Gradients:
    """Totals for hidden [n, H], weight [V, H] and bias [V], those that are wanted."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        wanted: tuple[bool, bool, bool],
        vocab: int,
        products: Products,
    ) -> None:
        self.inputs, self.products = inputs, products
        hidden, weight, bias = inputs
        self.hidden = torch.zeros(hidden.shape) if wanted[0] else None
        self.weight = WeightGradient(weight, vocab, products.storage) if wanted[1] else None
        self.bias = torch.zeros(bias.shape) if wanted[2] and bias is not None else None

    @contextmanager
    def of_rows(self, rows: slice | Tensor) -> Iterator[RowGradients]:
        """Open the totals to all tiles of K rows."""
        share = RowGradients(self, rows)
        yield share
        if self.hidden is not None and share.hidden is not None:
            self.hidden[rows] = share.hidden
        if self.weight is not None:
            self.weight.blank = False

    def scale_hidden(self, factors: Tensor) -> None:
        """Multiply the gradient of each hidden state by its factor [n]."""
        assert self.hidden is not None
        self.hidden *= factors[:, None]

    def rounded(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of their inputs; None where not wanted."""
        hidden, _, bias = self.inputs
        return (
            None if self.hidden is None else self.hidden.to(hidden.dtype),
            None if self.weight is None else self.weight.rounded(),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class RowGradients:
    """Takes the logit gradients of K rows, tile by tile."""

    def __init__(self, totals: Gradients, rows: slice | Tensor) -> None:
        self.totals = totals
        self.source = totals.inputs[0][rows]
        self.hidden: Tensor | None = None

    def add(self, dz: Tensor, columns: slice) -> None:
        """Add what dz [K, W] of a tile contributes."""
        totals, products = self.totals, self.totals.products
        if totals.hidden is not None:
            part = products.to_hidden(dz, totals.inputs[1][columns])
            self.hidden = part.float() if self.hidden is None else self.hidden.add_(part)
        if totals.weight is not None:
            out = totals.weight.room(columns)
            totals.weight.add(products.to_weight(dz, self.source, out), columns)
        if totals.bias is not None:
            totals.bias[columns] += dz.sum(0, dtype=torch.float32)


class WeightGradient:
    """The gradient of a weight [V, H]; 0 behind `vocab`.

    Products come in `storage`. For a bfloat16 weight and bfloat16 products the sum lives in two
    planes, the upper halves of its numbers in the gradient itself.
    """

    def __init__(self, weight: Tensor, vocab: int, storage: torch.dtype) -> None:
        self.total = torch.empty(weight.shape, dtype=storage)
        self.total[vocab:] = 0
        self.dtype, self.vocab = weight.dtype, vocab
        self.blank = True
        """Whether nothing has been added yet: what comes first is written, not added."""
        self._low: Tensor | None = None

    def room(self, rows: slice) -> Tensor | None:
        """Return where the first product for some rows may be written; None: nowhere."""
        return self.total[rows] if self.blank else None

    def add(self, part: Tensor, rows: slice) -> None:
        """Add `part` to some rows, unless it has been written there."""
        total = self.total[rows]
        if total.dtype == torch.float32 and part.T.is_contiguous() and not part.is_contiguous():
            _core.take_transposed(total, part.T, add=not self.blank)
        elif self.blank:
            if part.data_ptr() != total.data_ptr():
                total.copy_(part)
        elif total.dtype == torch.float32:
            total += part
        else:
            if self._low is None:
                self._low = torch.zeros(self.total.shape, dtype=torch.int16)
            _core.add_to_planes(total, self._low[rows], part)

    def rounded(self) -> Tensor:
        """Return the gradient in the dtype of the weight."""
        if self.blank:
            self.total[: self.vocab] = 0
        if self._low is not None:
            _core.round_planes(self.total, self._low)
        return self.total.to(self.dtype)
