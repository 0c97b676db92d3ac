"""Rows without a distribution, named instead of passed on."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.errors import EapoError


class NonFiniteError(EapoError, ValueError):
    """A token's logits hold a NaN or an infinity: hidden state, weight or bias is not finite."""


def check_finite(entropy: Tensor, tokens: int | Tensor) -> None:
    """Raise `NonFiniteError` that names the first row whose entropy is not a number.

    `tokens` says which token each row is, or the first of consecutive ones. Looks at nothing on a
    GPU, where that would mean to wait.
    """
    if entropy.device.type != "cpu":
        return
    bad = torch.isfinite(entropy).logical_not_()
    if not bad.any():
        return
    where = bad.nonzero().squeeze(1) + tokens if isinstance(tokens, int) else tokens[bad]
    more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
    raise NonFiniteError(
        f"hidden: token {int(where[0])}{more} has no distribution: its logits hold a NaN or an "
        "infinity, or all of them are banned; look at its hidden state, the weight and the bias"
    )
