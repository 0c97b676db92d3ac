"""A loss that is not finite: which number is to blame."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.errors import NonFiniteError
from eapo_fast.kernels import checks
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch

_IMPOSSIBLE = ("logprob", "old_logprob", "ref_logprob", "stats['max_logprob']")
"""Where -inf, probability 0, is a number like others as long as the loss is finite."""


def check_finite(
    found: LossOutput, logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch
) -> None:
    """Raise `NonFiniteError` with the culprit if the loss or a metric is no number (on a CPU)."""
    if not checks.may_look(logprob):
        return
    if torch.isfinite(torch.stack([found.loss, *found.metrics.values()])).all():
        return
    finite = bool(torch.isfinite(found.loss))
    check_inputs(logprob, entropy, batch, possible=_IMPOSSIBLE if finite else ())
    if finite:
        return
    bad = ~torch.isfinite(found.token_loss)
    raise NonFiniteError(
        f"the loss overflows, first at token {int(bad.nonzero()[0]) if bad.any() else 0}: its "
        "inputs are finite, but too large for the recipe"
    )


def check_inputs(
    logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch, *, possible: tuple[str, ...]
) -> None:
    """Raise `NonFiniteError` that names the first live number that is not finite (on a CPU).

    `possible`: the names of inputs that may be -inf.
    """
    if not checks.may_look(logprob):
        return
    inputs = {"logprob": logprob, "old_logprob": batch.old_logprob, "entropy": entropy}
    inputs |= {"ref_logprob": batch.ref_logprob, "advantages": batch.advantages}
    inputs |= {f"stats[{name!r}]": values for name, values in (batch.stats or {}).items()}
    for name, values in inputs.items():
        if values is None or not values.is_floating_point():
            continue
        bad = ~torch.isfinite(values)
        if name in possible:
            bad &= values != -torch.inf
        if batch.mask is not None and values.shape == batch.mask.shape:
            bad &= batch.mask != 0
        elif name == "advantages":
            bad &= _live_sequences(batch)
        if bad.any():
            at = int(bad.nonzero()[0]) if values.ndim else 0
            raise NonFiniteError(
                f"{name}: entry {at} is {values.flatten()[at].item()} ({int(bad.sum())} such "
                "entries), allowed are finite numbers; mask such tokens out, or find where they "
                "come from"
            )


def _live_sequences(batch: PolicyBatch) -> Tensor:
    """Return [S] flags: sequences with a masked-in token ([N], all set, for N advantages)."""
    sequences = len(batch.cu_seqlens) - 1
    if len(batch.advantages) != sequences:
        return torch.ones_like(batch.advantages, dtype=torch.bool)
    live = torch.ones_like(batch.old_logprob) if batch.mask is None else batch.mask != 0
    before = torch.cat([torch.zeros(1, dtype=torch.int64), live.long().cumsum(0)])
    return before[batch.cu_seqlens.long()].diff() > 0
