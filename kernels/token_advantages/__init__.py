"""Advantages of single tokens: discounted returns, and whitening over a batch."""

from __future__ import annotations

from torch import Tensor

from eapo_fast.errors import NonFiniteError
from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import (
    FLAGS,
    FLOATS,
    INTEGERS,
    check_cu_seqlens,
    check_tensor,
    compute_dtype,
    may_look,
)
from eapo_fast.kernels.token_advantages import reference

__all__ = ["token_advantages"]

_REFUSALS: dict[str, Refusal] = {}


def token_advantages(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    whiten: bool = False,
    restart: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the advantages of N packed tokens, float32 (float64 for float64); 0 where masked out.

    Returns first: `G_t = reward_t + gamma G_next`, next being the next masked-in token of the
    sequence. Then, on request, whitening over the masked-in tokens of the batch (REINFORCE++,
    arXiv 2501.03262): `(G - mean) / sqrt(var + 1e-8)`, var dividing by n - 1. A single token is
    its own mean.

    Args:
        rewards: [N] one a token, or [S] one a sequence, earned at its last masked-in token (with
            gamma = 1 every token has it). [S] if S = N.
        cu_seqlens: [S + 1] integers, first 0, last N.
        mask: [N] flags; 0 takes a token out of everything, whatever it holds.
        gamma: in [0, 1].
        whiten: whether to whiten.
        restart: whether a return starts anew before masked-out tokens, as in the published code of
            REINFORCE++, where only padding is masked; False: it passes over them.
        backend: "auto" or "reference".

    Raises `ValueError` for arguments that do not fit; `NonFiniteError`, on a CPU, where a reward
    that counts is not finite.
    """
    check_tensor("rewards", rewards, ["S or N"], FLOATS)
    check_tensor("cu_seqlens", cu_seqlens, ["S+1"], INTEGERS, rewards.device)
    sequences = len(cu_seqlens) - 1
    rows = len(rewards) if mask is None else len(mask)
    if mask is None and len(rewards) == sequences:
        rows = int(cu_seqlens[-1])
    check_cu_seqlens(cu_seqlens, rows, rewards.device)
    if mask is not None:
        check_tensor("mask", mask, ["N"], FLAGS, rewards.device)
    if len(rewards) not in (sequences, rows):
        raise ValueError(
            f"rewards: got {len(rewards)} values, allowed is one a sequence ({sequences}) or one a "
            f"token ({rows})"
        )
    if not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma: got {gamma!r}, allowed is 0 to 1")
    choose_backend("token_advantages", backend, _REFUSALS, rewards)
    found = reference.token_advantages(
        rewards.detach().double(),  # squares of large returns leave float32
        cu_seqlens.long(),
        rows,
        mask=None if mask is None else mask != 0,
        gamma=float(gamma),
        whiten=whiten,
        restart=restart,
    )
    _check_finite(found, rewards)
    return found.to(compute_dtype(rewards.dtype))


def _check_finite(found: Tensor, rewards: Tensor) -> None:
    if not may_look(found) or found.isfinite().all():
        return
    bad = ~rewards.isfinite()
    at = int(bad.nonzero()[0]) if bad.any() else 0
    raise NonFiniteError(
        f"rewards: entry {at} is {rewards[at].item()}, and the advantages are no numbers; mask "
        "such tokens out, or find where they come from"
    )
