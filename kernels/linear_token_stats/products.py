"""Matrix products of the CPU backend: float32 at full width, bfloat16 without losing logits.

torch hands float32 products to MKL, which runs its narrow kernels on processors that are not
Intel's; oneDNN's run at full width on all of them. bfloat16 products round what they return, so a
row's logits are computed relative to a centre close to those that matter: they keep their digits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eapo_fast import _core


class Centres(NamedTuple):
    """Where the logits of R rows lie."""

    middle: Tensor
    """[R] float32 that bfloat16 holds exactly: what products take off the logits."""
    own: Tensor
    """[R] float32, the target's logit itself."""


class Products(Protocol):
    """The three products of an LM head for one tile of `weight` [W, H]."""

    storage: torch.dtype
    """Dtype of logits and of their gradient."""
    rows: int
    """Numbers of rows that are multiples of this are fast."""

    @property
    def in_place(self) -> bool:
        """Whether `logits` writes where it is told to."""

    def centres(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, guess: Tensor | None
    ) -> Centres | None:
        """Return where the logits of each row lie; None: `logits` needs no centres.

        `guess` [R]: what the log-probabilities of the targets are likely to be.
        """

    def logits(
        self, hidden: Tensor, weight: Tensor, centres: Centres | None, out: Tensor
    ) -> Tensor:
        """Return hidden @ weight.T [R, W], less the middles of the rows: in `out` or new."""

    def to_hidden(self, dz: Tensor, weight: Tensor) -> Tensor:
        """Return dz @ weight [R, H]."""

    def to_weight(self, dz: Tensor, hidden: Tensor, out: Tensor | None) -> Tensor:
        """Return dz.T @ hidden [W, H], in `out` or new; that may be a transposed view."""


class Float32Products:
    """float32 products by oneDNN where torch has them; narrower weights are widened by tile."""

    storage = torch.float32
    rows = 1

    @property
    def in_place(self) -> bool:
        """False with oneDNN's products, which make their own tensor."""
        return not _has_onednn()

    def centres(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, guess: Tensor | None
    ) -> Centres | None:
        return None

    def logits(
        self, hidden: Tensor, weight: Tensor, centres: Centres | None, out: Tensor
    ) -> Tensor:
        return _linear(hidden.float(), weight.float(), out)

    def to_hidden(self, dz: Tensor, weight: Tensor) -> Tensor:
        return _linear(dz, weight.float().T)

    def to_weight(self, dz: Tensor, hidden: Tensor, out: Tensor | None) -> Tensor:
        """Return the view of a product whose large factor is read as it lies in memory."""
        if not _has_onednn():
            return torch.mm(dz.T, hidden.float(), out=out)
        return _linear(hidden.float().T, dz.T).T


class BFloat16Products:
    """bfloat16 products, which add in float32 and round once."""

    storage = torch.bfloat16
    rows = 8
    in_place = True

    def centres(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, guess: Tensor | None
    ) -> Centres | None:
        known = targets.clamp(max=len(weight) - 1)  # one behind the last is nobody's
        own = (weight.index_select(0, known).float() * hidden.float()).sum(1)
        middle = own if guess is None else own - guess.float().nan_to_num(0.0).clamp(-30.0, 0.0)
        return Centres(middle.bfloat16().float(), own)

    def logits(
        self, hidden: Tensor, weight: Tensor, centres: Centres | None, out: Tensor
    ) -> Tensor:
        assert centres is not None
        _core.fill_rows(out, -centres.middle)
        return out.addmm_(hidden, weight.T)

    def to_hidden(self, dz: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(dz, weight)

    def to_weight(self, dz: Tensor, hidden: Tensor, out: Tensor | None) -> Tensor:
        return torch.mm(dz.T, hidden) if out is None else torch.mm(dz.T, hidden, out=out)


def products_for(dtype: torch.dtype) -> Products:
    """Return the products for hidden states and weights of `dtype`.

    bfloat16 is widened where the processor has no bfloat16 dot products.
    """
    if dtype == torch.bfloat16 and _has_bfloat16_products():
        return BFloat16Products()
    return Float32Products()


def _has_bfloat16_products() -> bool:
    return _has_onednn() and torch.cpu._is_avx512_bf16_supported()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def _linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x @ weight.T, in `out` where the library can."""
    if _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product
    return torch.mm(x, weight.T) if out is None else torch.mm(x, weight.T, out=out)
