"""Group-relative advantages: one number a rollout, from the rewards of its prompt group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.errors import NonFiniteError, suggest
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import (
    FLAGS,
    FLOATS,
    INTEGERS,
    check_tensor,
    compute_dtype,
    may_look,
    refuse_transforms,
)
from eapo_fast.kernels.group_advantages import reference
from eapo_fast.kernels.native import cpu_refusal, cuda_refusal, triton_refusal
from eapo_fast.recipes.recipe import CENTERS, SCALES

__all__ = ["GroupStatistics", "group_advantages", "group_statistics"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupStatistics:
    """What a rollout is compared with."""

    center: Tensor
    """[S] subtracted from its reward; 0 in a group of one."""
    std: Tensor
    """[S] standard deviation of its group, without eps; 1 in a group of one."""


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    center: str = "mean",
    scale: str = "std",
    lengths: Tensor | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return `(reward - center) / scale` for each of S rollouts, float32 (float64 for float64).

    Args:
        rewards: [S] floating point.
        group_ids: [S] integers; equal means same prompt group, in any order.
        center: "mean" (GRPO, arXiv 2402.03300), "loo" (leave-one-out: RLOO, arXiv 2402.14740),
            "length" (mean weighted by `lengths`: OPO, arXiv 2505.23585) or "none".
        scale: "std" of the group, "batch_std" of all valid rollouts, or "none" (Dr.GRPO).
        lengths: [S] integers, policy tokens of each rollout; needed by center "length" only.
        eps: added to the standard deviation.
        ddof: the variance divides by n - ddof; 0 or 1.
        valid: [S] flags; a rollout that is not valid gets 0 and enters no statistic.
        backend: "auto" (cpu for float32 on the CPU, else reference), "reference", "cpu", "cuda" or
            "triton"; the last two run when they are named.

    A group of one has center 0 and std 1; a constant group gives exactly 0. Raises `ValueError`
    for arguments that do not fit and for a backend that cannot run here; `NonFiniteError`, on a
    CPU, for the reward of a valid rollout that is not finite.
    """
    _check(rewards, group_ids, center, scale, lengths, eps, ddof, valid)
    rewards = rewards.detach().to(compute_dtype(rewards.dtype))
    chosen = choose_backend(
        "group_advantages",
        backend,
        {"cpu": cpu_refusal},
        rewards,
        on_request={"cuda": cuda_refusal, "triton": triton_refusal},
    )
    return _implementation(chosen)(
        rewards,
        group_ids.long(),
        center=center,
        scale=scale,
        lengths=None if lengths is None else lengths.long(),
        eps=eps,
        ddof=ddof,
        valid=None if valid is None else valid != 0,
    )


def group_statistics(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    center: str = "mean",
    lengths: Tensor | None = None,
    ddof: int = 1,
) -> GroupStatistics:
    """Return center and std of each rollout's group; arguments and errors as `group_advantages`."""
    _check(rewards, group_ids, center, "std", lengths, 0.0, ddof, None)
    found = reference.group_statistics(
        rewards.detach().to(compute_dtype(rewards.dtype)),
        group_ids.long(),
        center=center,
        lengths=None if lengths is None else lengths.long(),
        ddof=ddof,
    )
    return GroupStatistics(center=found[0], std=found[1])


def _implementation(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":
        from eapo_fast.kernels.group_advantages import triton_kernel

        return triton_kernel.group_advantages
    if backend == "cuda":
        from eapo_fast import _cuda

        return partial(_compiled, _cuda.group_advantages)
    if backend == "cpu":
        return partial(_compiled, _core.group_advantages)
    return reference.group_advantages


def _compiled(
    kernel: Callable[..., None],
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
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    kernel(
        rewards.contiguous(),
        group_ids.contiguous(),
        center,
        scale,
        None if lengths is None else lengths.contiguous(),
        eps,
        ddof,
        None if valid is None else valid.contiguous(),
        out,
    )
    return out


def _check(
    rewards: Tensor,
    group_ids: Tensor,
    center: str,
    scale: str,
    lengths: Tensor | None,
    eps: float,
    ddof: int,
    valid: Tensor | None,
) -> None:
    check_tensor("rewards", rewards, ["S"], FLOATS)
    refuse_transforms("rewards", rewards)
    rollouts, device = rewards.shape[0], rewards.device
    check_tensor("group_ids", group_ids, [rollouts], INTEGERS, device)
    for name, value, allowed in (("center", center, CENTERS), ("scale", scale, SCALES)):
        if value not in allowed:
            words = ", ".join(allowed)
            raise ValueError(
                f"{name}: got {value!r}, allowed is one of {words}.{suggest(str(value), allowed)}"
            )
    if isinstance(ddof, bool) or ddof not in (0, 1):
        raise ValueError(f"ddof: got {ddof!r}, allowed is 0 or 1")
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps!r}, allowed is a finite number of 0 or more")
    if lengths is not None:
        check_tensor("lengths", lengths, [rollouts], INTEGERS, device)
        if may_look(lengths) and bool((lengths < 0).any()):
            at = int((lengths < 0).nonzero()[0])
            raise ValueError(f"lengths: entry {at} is {int(lengths[at])}, allowed is 0 or more")
    elif center == "length":
        raise ValueError("lengths: center 'length' weights by the policy tokens of each rollout")
    if valid is not None:
        check_tensor("valid", valid, [rollouts], FLAGS, device)
    if may_look(rewards):
        _check_finite(rewards, valid)


def _check_finite(rewards: Tensor, valid: Tensor | None) -> None:
    bad = ~torch.isfinite(rewards)
    if valid is not None:
        bad &= valid != 0
    if bad.any():
        at = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"rewards: entry {at} is {rewards[at].item()} ({int(bad.sum())} such entries), and so "
            "would be its whole group; say by `valid` which rollouts have no reward"
        )
