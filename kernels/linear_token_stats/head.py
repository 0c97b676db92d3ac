"""The LM head of a block of rows: logits of a chunk, and the way back from their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from eapo_fast.kernels.checks import compute_dtype

_VOCAB_TILE = 8192
"""Rows of a low-precision weight that are widened to float32 at once."""

F = TypeVar("F", bound=Callable[..., Any])


def _exact(method: F) -> F:
    """Keep an enclosing `torch.autocast` from rounding the products of `method`."""

    @wraps(method)
    def run(self: Head, *args: Any) -> Any:
        with torch.autocast(device_type=self.weight.device.type, enabled=False):
            return method(self, *args)

    return cast(F, run)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """`z = cap(hidden @ weight.T + bias) / temperature`, with some z set to -inf."""

    weight: Tensor
    """[V, H], rows of the real vocabulary only."""
    bias: Tensor | None = None
    """[V]; -inf bans a token everywhere."""
    temperature: float = 1.0
    """Divides the logits, after the cap."""
    softcap: float | None = None
    """cap(y) = softcap * tanh(y / softcap); None: y itself."""
    banned: tuple[Tensor, Tensor] | None = None
    """(rows, ids), rows ascending: entries whose z is -inf."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits and gradients: float64 for a float64 weight, else float32."""
        return compute_dtype(self.weight.dtype)

    @_exact
    def logits(self, hidden: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """Return z [R, V] of rows start ... start + R, and dz/dy of the cap where there is one."""
        wide = hidden.to(self.dtype)
        z = torch.empty(len(hidden), len(self.weight), dtype=self.dtype, device=hidden.device)
        for columns, weight in self._tiles():
            torch.mm(wide, weight.T, out=z[:, columns])
        if self.bias is not None:
            z += self.bias
        slope = None
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            slope = z.square().neg_().add_(1)
            z *= self.softcap
            if self.bias is not None:
                z.masked_fill_(self.bias == -torch.inf, -torch.inf)
        if self.banned is not None:
            rows, ids = self._banned_in(start, start + len(hidden))
            z[rows - start, ids] = -torch.inf
        return z.div_(self.temperature), slope

    @_exact
    def accumulate(
        self,
        dz: Tensor,
        slope: Tensor | None,
        hidden: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        """Add what dz [R, V], overwritten, contributes to each gradient that is not None."""
        dz /= self.temperature
        if slope is not None:
            dz *= slope
        if grad_bias is not None:
            grad_bias += dz.sum(0)
        wide = hidden.to(self.dtype)
        for columns, weight in self._tiles():
            if grad_hidden is not None:
                grad_hidden.addmm_(dz[:, columns], weight)
            if grad_weight is not None:
                grad_weight[columns].addmm_(dz[:, columns].T, wide)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        size = len(self.weight)
        step = size if self.weight.dtype == self.dtype else _VOCAB_TILE
        for start in range(0, size, step):
            columns = slice(start, min(start + step, size))
            yield columns, self.weight[columns].to(self.dtype)

    def _banned_in(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.banned is not None
        rows, ids = self.banned
        edges = torch.tensor([start, stop], dtype=rows.dtype, device=rows.device)
        low, high = torch.searchsorted(rows, edges).tolist()
        return rows[low:high], ids[low:high]


def normalise(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ln p (in place of z) and the two numbers a row that `renormalise` needs."""
    peak = z.amax(-1)
    log_sum = z.sub_(peak[:, None]).exp().sum(-1).log_()
    return z.sub_(log_sum[:, None]), peak, log_sum


def renormalise(z: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
    """Return ln p (in place of z), bit for bit as `normalise` did."""
    return z.sub_(peak[:, None]).sub_(log_sum[:, None])


def plogp(log_p: Tensor, p: Tensor) -> Tensor:
    """Return p ln p (in place of ln p), 0 where p is 0."""
    return log_p.clamp_(min=-1000.0).mul_(p)


def logit_gradient(
    a: Tensor, b: Tensor | None, log_p: Tensor, entropy: Tensor, targets: Tensor
) -> Tensor:
    """Return dz = a (onehot - p) + b (-p (ln p + H)) [R, V], overwriting `log_p`.

    A banned entry has p = 0 and gets 0, also where it is the target.
    """
    target = targets[:, None]
    step = torch.where(log_p.gather(1, target) > -torch.inf, a[:, None], 0.0)
    p = log_p.exp()
    if b is None:
        dz = torch.mul(p, -a[:, None], out=log_p)
    else:
        dz = plogp(log_p, p).mul_(-b[:, None])
        dz -= p.mul_((a + b * entropy)[:, None])
    return dz.scatter_(1, target, dz.gather(1, target) + step)
