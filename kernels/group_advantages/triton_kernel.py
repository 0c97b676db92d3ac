"""Group-relative advantages in Triton: one program a group, double accumulation.

`reference.py` gives the formulas. Rollouts are brought into group order first, so a program reads
its members through one contiguous slice of that order; groups may have up to 65536 members.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_CENTERS = {"none": 0, "mean": 1, "loo": 2, "length": 3}
_MAX_GROUP = 1 << 16


@triton.jit
def _deviation(distance, live, count, ddof):  # type: ignore[no-untyped-def]
    """Square root of the variance of `distance`; 1 for a single member."""
    squares = tl.sum(tl.where(live, distance * distance, 0.0), 0)
    variance = squares / tl.maximum(count - ddof, 1.0)
    return tl.where(count == 1.0, 1.0, tl.sqrt(variance))


@triton.jit  # type: ignore[untyped-decorator]
def _advantages(  # type: ignore[no-untyped-def]
    rewards,  # [S] fp32
    lengths,  # [S] int64, read with CENTER 3 only
    order,  # [S] int64, rollouts in group order
    starts,  # [groups + 1] int64, slices of order
    divisors,  # [1] fp64, read with DIVISOR 2 only
    out,  # [S] fp32
    eps,
    ddof,
    CENTER: tl.constexpr,  # as in _CENTERS
    DIVISOR: tl.constexpr,  # 0 one, 1 std of the group, 2 the given one
    BLOCK: tl.constexpr,  # power of two >= members of any group
):
    group = tl.program_id(0)
    start = tl.load(starts + group)
    members = tl.load(starts + group + 1) - start
    offsets = tl.arange(0, BLOCK)
    live = offsets < members
    rollout = tl.load(order + start + offsets, mask=live, other=0)
    reward = tl.load(rewards + rollout, mask=live, other=float("inf")).to(tl.float64)
    count = members.to(tl.float64)
    excess = tl.where(live, reward - tl.min(reward, 0), 0.0)
    distance = excess - tl.sum(excess, 0) / count
    advantage = reward
    if CENTER == 1:
        advantage = distance
    if CENTER == 2:
        advantage = distance * count / tl.maximum(count - 1.0, 1.0)
    if CENTER == 3:
        weight = tl.load(lengths + rollout, mask=live, other=0).to(tl.float64)
        weight = tl.where(tl.sum(weight, 0) > 0.0, weight, tl.where(live, 1.0, 0.0))
        advantage = excess - tl.sum(weight * excess, 0) / tl.sum(weight, 0)
    advantage = tl.where(count == 1.0, reward, advantage)
    divided = advantage
    if DIVISOR == 1:
        divided = advantage / (_deviation(distance, live, count, ddof) + eps)
    if DIVISOR == 2:
        divided = advantage / (tl.load(divisors) + eps)
    advantage = tl.where(advantage == 0.0, 0.0, divided)  # also where the deviation and eps are 0
    tl.store(out + rollout, advantage.to(tl.float32), mask=live)


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
    """Return advantages [S] float32 of float32 rewards; arguments are checked by the caller."""
    out = torch.zeros_like(rewards)
    live = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
    rows = live.nonzero().squeeze(-1)
    if rows.numel() == 0:
        return out
    _, index, counts = group_ids[rows].unique(return_inverse=True, return_counts=True)
    largest = int(counts.max())
    if largest > _MAX_GROUP:
        raise ValueError(f"group_ids: a group has {largest} members, Triton takes {_MAX_GROUP}")
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    launch: Any = _advantages[(len(counts),)]
    launch(
        rewards.contiguous(),
        rewards if lengths is None else lengths.contiguous(),
        rows[index.argsort(stable=True)],
        starts,
        _batch_deviation(rewards[rows], ddof) if scale == "batch_std" else rewards,
        out,
        eps,
        ddof,
        CENTER=_CENTERS[center],
        DIVISOR={"none": 0, "std": 1, "batch_std": 2}[scale],
        BLOCK=triton.next_power_of_2(largest),
    )
    return out


def _batch_deviation(rewards: Tensor, ddof: int) -> Tensor:
    """Standard deviation [1] float64 of all rewards; 1 for a single one."""
    if rewards.numel() == 1:
        return rewards.new_ones(1, dtype=torch.float64)
    excess = rewards.double() - rewards.min()
    squares = (excess - excess.mean()).square().sum()
    return (squares / max(rewards.numel() - ddof, 1)).sqrt().unsqueeze(0)
