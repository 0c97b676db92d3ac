"""Group-relative advantages in plain torch: any device, float32 or float64, deterministic.

With R_i the reward of rollout i, g its prompt group, n the number of valid rollouts of g and T_i
the number of policy tokens of i, the advantage is `(R_i - center) / scale`:

    center  mean      mean_g = sum_g R / n                          GRPO, arXiv 2402.03300
            loo       mean over the others of g                     RLOO, arXiv 2402.14740
            length    sum_g T R / sum_g T  (mean_g if all T are 0)  OPO,  arXiv 2505.23585
            none      0
    scale   std       std_g(R) + eps   (divides by n - ddof)        GRPO
            batch_std std(R) over all valid rollouts + eps          TRL, scale_rewards="batch"
            none      1                                             Dr.GRPO, arXiv 2503.20783

A group with one valid rollout has center 0 and std 1, and so has a batch with one. Sums run over
rewards minus the smallest reward of their group (batch), so a constant group gives exactly 0 with
every center but "none". Invalid rollouts get 0 and enter no statistic, whatever they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    center: str,
    scale: str,
    lengths: Tensor | None,
    eps: float,
    ddof: int,
    valid: Tensor | None,
) -> Tensor:
    """Return advantages [S] in the dtype of `rewards`; arguments are checked by the caller."""
    wide = rewards.double()  # squares of large rewards leave float32
    if valid is None:
        return _advantages(wide, group_ids, center, scale, lengths, eps, ddof).to(rewards.dtype)
    rows = valid.nonzero().squeeze(-1)
    kept_lengths = None if lengths is None else lengths[rows]
    kept = _advantages(wide[rows], group_ids[rows], center, scale, kept_lengths, eps, ddof)
    return torch.zeros_like(rewards).index_copy_(0, rows, kept.to(rewards.dtype))


def group_statistics(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    center: str,
    lengths: Tensor | None,
    ddof: int,
) -> tuple[Tensor, Tensor]:
    """Return the center and the std [S] of each rollout's group; arguments are checked before."""
    if rewards.numel() == 0:
        return rewards.clone(), rewards.clone()
    groups = _Groups(group_ids)
    least = groups.spread(groups.reduce(rewards, "min"))
    centered = _centered(rewards, rewards - least, groups, center, lengths)
    return rewards - centered, _std(rewards - least, groups, ddof)


def _advantages(
    rewards: Tensor,
    group_ids: Tensor,
    center: str,
    scale: str,
    lengths: Tensor | None,
    eps: float,
    ddof: int,
) -> Tensor:
    if rewards.numel() == 0:
        return rewards.clone()
    groups = _Groups(group_ids)
    excess = rewards - groups.spread(groups.reduce(rewards, "min"))
    advantages = _centered(rewards, excess, groups, center, lengths)
    if scale == "none":
        return advantages
    if scale == "std":
        deviation = _std(excess, groups, ddof)
    else:
        deviation = _std(rewards - rewards.min(), _Groups(torch.zeros_like(group_ids)), ddof)
    return torch.where(advantages == 0, 0.0, advantages / (deviation + eps))


def _centered(
    rewards: Tensor, excess: Tensor, groups: _Groups, center: str, lengths: Tensor | None
) -> Tensor:
    if center == "none":
        return rewards
    count = groups.count.to(rewards.dtype)
    if center == "length":
        assert lengths is not None
        weight = lengths.to(rewards.dtype)
        weight = torch.where(groups.spread(groups.reduce(weight, "sum")) > 0, weight, 1.0)
        mean = groups.reduce(weight * excess, "sum") / groups.reduce(weight, "sum")
    else:
        mean = groups.reduce(excess, "sum") / count
    centered = excess - groups.spread(mean)
    if center == "loo":
        centered = centered * groups.spread(count / (count - 1).clamp(min=1))
    return torch.where(groups.spread(groups.count) == 1, rewards, centered)


def _std(excess: Tensor, groups: _Groups, ddof: int) -> Tensor:
    count = groups.count.to(excess.dtype)
    deviation = excess - groups.spread(groups.reduce(excess, "sum") / count)
    variance = groups.reduce(deviation.square(), "sum") / (count - ddof).clamp(min=1)
    return groups.spread(torch.where(groups.count == 1, 1.0, variance.sqrt()))


class _Groups:
    """Reductions over the members of each group, in one fixed order (no atomics)."""

    def __init__(self, group_ids: Tensor) -> None:
        found = torch.unique(group_ids, return_inverse=True, return_counts=True)
        _, self.index, self.count = found
        self.order = self.index.argsort(stable=True)

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Reduce [S] to one value a group."""
        return torch.segment_reduce(values[self.order], how, lengths=self.count, unsafe=True)

    def spread(self, per_group: Tensor) -> Tensor:
        """Give every member the value of its group: [groups] to [S]."""
        return per_group[self.index]
