"""An LM head and its rows in plain torch, chunk after chunk of whole rows of logits.

With upstream gradients a = dL/dlogprob and b = dL/dentropy the gradient of a row's logits is
`a (onehot - p) + b (-p (ln p + H))`, and with c = dL/d(truncated entropy Ht) further
`c (-q (ln q + Ht))` on the kept tokens, whose renormalised probabilities are q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients
from eapo_fast.kernels.linear_token_stats.head import (
    Head,
    logit_gradient,
    normalise,
    plogp,
    renormalise,
)
from eapo_fast.kernels.truncated_entropy.reference import Cut, truncated_entropy

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once when no chunk size is asked for: 128 MiB in float32."""
STATE = 5
"""Numbers in the state of a row."""


class TorchHead:
    """Statistics of n rows and their gradients, in float32 or, for float64 inputs, in float64.

    `read` fills `logprob` and `entropy`, `push` and `replay` add to the gradients that are wanted.
    `state` [n, 5] holds peak, log of the sum, entropy, sum p^2 and sum p^3 of each row.
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
        self.head = Head(
            weight=weight[:vocab_size],
            bias=None if bias is None else bias[:vocab_size],
            temperature=temperature,
            softcap=softcap,
            banned=_sorted(banned),
        )
        dtype = self.head.dtype
        self.source, self.targets, self.chunk_size = hidden, targets, chunk_size
        self.state = hidden.new_empty(len(hidden), STATE, dtype=dtype) if state is None else state
        self.logprob = hidden.new_empty(len(hidden), dtype=dtype)
        inputs = (hidden, weight, bias)
        self._dtypes = [None if x is None else x.dtype for x in inputs]
        self._totals = [
            x.new_zeros(x.shape, dtype=dtype) if x is not None and want else None
            for x, want in zip(inputs, wanted, strict=True)
        ]
        self.truncation: Cut | None = None
        """If set: of the truncated entropy and mass [n] that `read` then fills in."""
        self.truncated: Tensor | None = None
        self.kept_mass: Tensor | None = None
        self._kept: tuple[Tensor, Tensor | None] | None = None

    @property
    def entropy(self) -> Tensor:
        """[n] in nats, of rows read so far."""
        return self.state[:, 2]

    def slab_rows(self, *, keep: bool) -> int:
        """Return how many rows of logits are made at once."""
        return self.chunk_size or max(1, CHUNK_ELEMENTS // len(self.head.weight))

    def read(self, start: int, stop: int, *, keep: bool, powers: bool = False) -> None:
        """Compute the statistics of rows start ... stop; `push` needs `keep`."""
        rows = slice(start, stop)
        z, slope = self.head.logits(self.source[rows], start)
        log_p, self.state[rows, 0], self.state[rows, 1] = normalise(z)
        self.logprob[rows] = log_p.gather(1, self.targets[rows, None]).squeeze(1)
        if self.truncation is not None:
            if self.truncated is None or self.kept_mass is None:
                self.truncated = torch.empty_like(self.logprob)
                self.kept_mass = torch.empty_like(self.logprob)
            kept = self.truncation.kept(log_p)
            self.kept_mass[rows], self.truncated[rows] = truncated_entropy(log_p, kept)
        p = log_p.exp()
        if powers:
            self.state[rows, 3], self.state[rows, 4] = p.square().sum(1), p.pow(3).sum(1)
        self.state[rows, 2] = plogp(log_p.clone() if keep else log_p, p).sum(1).neg_()
        self._kept = (log_p, slope) if keep else None

    def push(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, the last ones read, given their coefficients.

        Rows whose coefficients are 0 take no part.
        """
        assert self._kept is not None
        self._add(start, *self._kept, slopes)

    def replay(self, start: int, stop: int, slopes: Coefficients) -> None:
        """Add the gradients of rows start ... stop, read before, computing their logits again."""
        size = self.slab_rows(keep=False)
        for first in range(start, stop, size):
            rows = slice(first, min(first + size, stop))
            z, slope = self.head.logits(self.source[rows], first)
            log_p = renormalise(z, self.state[rows, 0], self.state[rows, 1])
            self._add(first, log_p, slope, slopes.of(slice(first - start, rows.stop - start)))

    def scale_hidden(self, factors: Tensor) -> None:
        """Multiply the gradient of each hidden state by its factor [n]."""
        total = self._totals[0]
        assert total is not None
        total *= factors[:, None]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden, weight and bias, rounded once; None where not wanted."""
        hidden, weight, bias = (
            None if total is None or dtype is None else total.to(dtype)
            for total, dtype in zip(self._totals, self._dtypes, strict=True)
        )
        return hidden, weight, bias

    def extra(self, name: str) -> Tensor:
        """Return a further statistic [n] of rows read with `powers`."""
        _, log_sum, _, sum_p2, sum_p3 = self.state.unbind(1)
        found = {
            "max_logprob": -log_sum,
            "p_max": (-log_sum).exp(),
            "sum_p2": sum_p2,
            "sum_p3": sum_p3,
            "kept_mass": self.kept_mass,
            "truncated_entropy": self.truncated,
        }[name]
        return self.logprob if found is None else found  # None: no rows were read

    def close(self) -> None:
        """Give memory back; the head is of no use afterwards."""
        self._kept = None

    def _add(self, start: int, log_p: Tensor, slope: Tensor | None, slopes: Coefficients) -> None:
        rows: slice | Tensor = slice(start, start + len(log_p))
        active = slopes.active()
        if active is not None:
            rows, log_p, slopes = start + active, log_p[active], slopes.of(active)
            slope = None if slope is None else slope[active]
        extra = None if slopes.c is None else self._truncated_gradient(slopes.c, log_p)
        dz = logit_gradient(slopes.a, slopes.b, log_p, self.entropy[rows], self.targets[rows])
        if extra is not None:
            dz += extra
        to_hidden, to_weight, to_bias = self._totals
        vocab = len(self.head.weight)
        own = None if to_hidden is None else to_hidden[rows]
        self.head.accumulate(
            dz,
            slope,
            self.source[rows],
            own,
            None if to_weight is None else to_weight[:vocab],
            None if to_bias is None else to_bias[:vocab],
        )
        if to_hidden is not None and own is not None:
            to_hidden[rows] = own

    def _truncated_gradient(self, c: Tensor, log_p: Tensor) -> Tensor:
        assert self.truncation is not None
        kept = self.truncation.kept(log_p)
        mass, entropy = truncated_entropy(log_p, kept)
        log_q = torch.where(kept, log_p - mass.log()[:, None], 0.0)
        q = torch.where(kept, log_q.exp(), 0.0)
        return q.mul_(log_q.add_(entropy[:, None])).mul_(-c[:, None])


def _sorted(banned: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Order (rows, ids) by row, as `Head` wants them."""
    if banned is None:
        return None
    rows, order = banned[0].long().sort(stable=True)
    return rows, banned[1].long()[order]
