"""Token statistics of an LM head in plain torch, chunk by chunk.

Forward saves hidden, weight, targets and three numbers a row; backward recomputes the logits. With
upstream gradients a = dL/dlogprob and b = dL/dentropy the gradient of the logits is
`a (onehot - p) + b (-p (ln p + H))`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from eapo_fast.kernels.linear_token_stats.head import (
    Head,
    logit_gradient,
    normalise,
    plogp,
    renormalise,
)

EXTRAS = ("max_logprob", "sum_p2", "sum_p3")
"""Statistics on request, not differentiable: ln of the largest p, sum of p^2, sum of p^3."""


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    banned: tuple[Tensor, Tensor] | None,
    extras: tuple[str, ...],
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    """Return logprob [N], entropy [N], then one [N] for each of `extras`; arguments are checked."""
    settings = (temperature, softcap, vocab_size, sort_banned(banned), extras, chunk_size)
    results = _Stats.apply(hidden, weight, bias, targets, settings)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, ...], results)


def sort_banned(banned: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Order (rows, ids) by row, as `Head` wants them."""
    if banned is None:
        return None
    rows, order = banned[0].long().sort(stable=True)
    return rows, banned[1].long()[order]


class _Stats(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        *_, extras, chunk_size = settings
        head = _head(weight, bias, settings)
        out = hidden.new_empty(2 + len(extras), len(hidden), dtype=head.dtype)
        peak, log_sum = torch.empty_like(out[0]), torch.empty_like(out[0])
        for start, stop in head.chunks(len(hidden), chunk_size):
            z, _ = head.logits(hidden[start:stop], start)
            log_p, peak[start:stop], log_sum[start:stop] = normalise(z)
            _fill(out[:, start:stop], log_p, targets[start:stop], extras)
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, targets, peak, log_sum, out[1])
        ctx.set_materialize_grads(False)
        results = tuple(row.clone() for row in out)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b = upstream[:2]
        if a is None and b is None:
            return (None,) * 5
        hidden, weight, bias, targets, peak, log_sum, entropy = ctx.saved_tensors
        head = _head(weight, bias, ctx.settings)
        grads = Gradients(hidden, weight, bias, head, ctx.needs_input_grad[:3])
        if a is None:
            a = torch.zeros_like(peak)
        for start, stop in head.chunks(len(hidden), ctx.settings[-1]):
            part = slice(start, stop)
            z, slope = head.logits(hidden[part], start)
            log_p = renormalise(z, peak[part], log_sum[part])
            own_b = None if b is None else b[part]
            dz = logit_gradient(a[part], own_b, log_p, entropy[part], targets[part])
            grads.add(dz, slope, part)
        return (*grads.rounded(), None, None)


class Gradients:
    """Gradients of hidden, weight and bias, summed over chunks in the dtype of the head."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: tuple[bool, ...],
    ) -> None:
        inputs = (hidden, weight, bias)
        self.head, self.source = head, hidden
        self.dtypes = [None if x is None else x.dtype for x in inputs]
        self.hidden, self.weight, self.bias = (
            torch.zeros(x.shape, dtype=head.dtype, device=x.device)
            if x is not None and want
            else None
            for x, want in zip(inputs, wanted, strict=True)
        )

    def add(self, dz: Tensor, slope: Tensor | None, rows: slice) -> None:
        """Add the share of `rows`, whose logit gradient is `dz` (overwritten)."""
        vocab = len(self.head.weight)
        self.head.accumulate(
            dz,
            slope,
            self.source[rows],
            None if self.hidden is None else self.hidden[rows],
            None if self.weight is None else self.weight[:vocab],
            None if self.bias is None else self.bias[:vocab],
        )

    def rounded(self) -> list[Tensor | None]:
        """Return the three gradients in the dtypes of their inputs; None where not wanted."""
        totals = (self.hidden, self.weight, self.bias)
        return [
            None if total is None or dtype is None else total.to(dtype)
            for total, dtype in zip(totals, self.dtypes, strict=True)
        ]


def _head(weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Head:
    temperature, softcap, vocab_size, banned, *_ = settings
    return Head(
        weight=weight[:vocab_size],
        bias=None if bias is None else bias[:vocab_size],
        temperature=temperature,
        softcap=softcap,
        banned=banned,
    )


def _fill(out: Tensor, log_p: Tensor, targets: Tensor, extras: tuple[str, ...]) -> None:
    """Write the statistics of a chunk into out [2 + extras, R]; `log_p` is overwritten."""
    out[0] = log_p.gather(1, targets[:, None]).squeeze(1)
    p = log_p.exp()
    for row, extra in enumerate(extras, start=2):
        if extra == "max_logprob":
            out[row] = log_p.amax(1)
        else:
            out[row] = p.pow(2 if extra == "sum_p2" else 3).sum(1)
    out[1] = plogp(log_p, p).sum(1).neg_()
