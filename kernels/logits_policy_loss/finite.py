"""Rows of logits without a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.finite import NonFiniteError


def check_finite(entropy: Tensor) -> None:
    """Raise `NonFiniteError` that names the first row whose entropy is no number (on a CPU)."""
    if entropy.device.type != "cpu":
        return
    bad = ~torch.isfinite(entropy)
    if not bad.any():
        return
    where = bad.nonzero().squeeze(1)
    more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
    raise NonFiniteError(
        f"logits: row {int(where[0])}{more} has no distribution: it holds a NaN or an infinity, or "
        "nothing but -inf; mask such tokens out, or find where they come from"
    )
