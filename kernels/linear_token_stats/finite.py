"""Rows without a distribution, named instead of passed on.

On a CPU they are looked for before anything is returned. On a GPU that would mean to wait, so the
number of the first one stays there, for whoever waits anyway: `LossOutput.check`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.errors import NonFiniteError
from eapo_fast.kernels import checks

__all__ = ["NonFiniteError", "check_finite", "first_bad", "no_distribution"]


def check_finite(entropy: Tensor, tokens: int | Tensor) -> None:
    """Raise `NonFiniteError` that names the first row whose entropy is not a number.

    `tokens` says which token each row is, or the first of consecutive ones. Looks at nothing on a
    GPU, where that would mean to wait.
    """
    if not checks.may_look(entropy):
        return
    bad = torch.isfinite(entropy).logical_not_()
    if not bad.any():
        return
    where = bad.nonzero().squeeze(1) + tokens if isinstance(tokens, int) else tokens[bad]
    raise no_distribution(int(where[0]), len(where) - 1)


def first_bad(entropy: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return the token of the first row whose entropy is not a number, -1 if there is none.

    Args:
        entropy: [n].
        tokens: [n] which token each row is, rising; None: its own number.

    Returns a 0-dim int64 tensor, without waiting for a device.
    """
    if tokens is None:
        tokens = torch.arange(len(entropy), device=entropy.device)
    none = torch.iinfo(torch.int64).max
    found = torch.where(torch.isfinite(entropy), none, tokens)
    first = torch.cat([found, found.new_full((1,), none)]).amin()
    return torch.where(first == none, -1, first)


def no_distribution(token: int, more: int = 0) -> NonFiniteError:
    """Return the error that names a token, and how many more there are."""
    others = f" (and {more} more)" if more else ""
    return NonFiniteError(
        f"hidden: token {token}{others} has no distribution: its logits hold a NaN or an "
        "infinity, or all of them are banned; look at its hidden state, the weight and the bias"
    )
