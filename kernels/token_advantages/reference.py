"""Token advantages in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_VARIANCE_EPS = 1e-8


def token_advantages(
    rewards: Tensor,
    cu_seqlens: Tensor,
    total: int,
    *,
    mask: Tensor | None,
    gamma: float,
    whiten: bool,
    restart: bool,
) -> Tensor:
    """Return advantages [N] in the dtype of `rewards`; arguments are checked by the caller."""
    sequences = len(cu_seqlens) - 1
    sequence = torch.arange(sequences, device=rewards.device).repeat_interleave(
        cu_seqlens.diff(), output_size=total
    )
    index = torch.arange(total, device=rewards.device)
    index = index if mask is None else index[mask]
    sequence = sequence[index]
    if len(rewards) == sequences:
        last = sequence != torch.cat([sequence[1:], sequence.new_full((1,), -1)])
        earned = torch.where(last, rewards[sequence], 0.0)
    else:
        earned = rewards[index]
    stretch = sequence * total + (index - torch.arange(len(index), device=index.device))
    values = discounted(earned, stretch if restart else sequence, gamma)
    if whiten:
        values = whitened(values)
    return rewards.new_zeros(total).index_copy_(0, index, values)


def discounted(rewards: Tensor, stretch: Tensor, gamma: float) -> Tensor:
    """Return G_t = reward_t + gamma G_(t+1) [n] inside each stretch of equal numbers.

    Sums of 1, 2, 4, ... terms are joined in pairs.
    """
    values, reach = rewards.clone(), 1
    while reach < len(values):
        joined = stretch[:-reach] == stretch[reach:]
        if not bool(joined.any()):
            break
        later = torch.where(joined, values[reach:] * gamma**reach, 0.0)
        values = torch.cat([values[:-reach] + later, values[-reach:]])
        reach *= 2
    return values


def whitened(values: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) [n], var over n - 1."""
    if not len(values):
        return values
    excess = values - values.min()
    centred = excess - excess.mean()
    variance = centred.square().sum() / max(len(values) - 1, 1)
    return centred * (variance + _VARIANCE_EPS).rsqrt()
