"""A loss that is not finite: which number is to blame."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels import checks
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch


def check_finite(
    found: LossOutput, logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch
) -> None:
    """Raise `ValueError` with the culprit if the loss is not finite (on a CPU)."""
    if not checks.may_look(logprob) or torch.isfinite(found.loss):
        return
    inputs = {"logprob": logprob, "old_logprob": batch.old_logprob, "entropy": entropy}
    inputs |= {"ref_logprob": batch.ref_logprob, "advantages": batch.advantages}
    inputs |= {f"stats[{name!r}]": values for name, values in (batch.stats or {}).items()}
    for name, values in inputs.items():
        if values is None or not values.is_floating_point():
            continue
        bad = ~torch.isfinite(values)
        if batch.mask is not None and values.shape == batch.mask.shape:
            bad &= batch.mask != 0
        if bad.any():
            at = int(bad.nonzero()[0]) if values.ndim else 0
            raise ValueError(
                f"{name}: entry {at} is {values.flatten()[at].item()} ({int(bad.sum())} such "
                "entries), and so is the loss; mask such tokens out, or find where they come from"
            )
    bad = ~torch.isfinite(found.token_loss)
    raise ValueError(
        f"the loss overflows, first at token {int(bad.nonzero()[0]) if bad.any() else 0}: its "
        "inputs are finite, but too large for the recipe"
    )
