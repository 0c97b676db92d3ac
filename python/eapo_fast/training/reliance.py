"""How much correct assisted rollouts lean on the advice: EAPO specification, part 12.

reliance = mean[ log pi(y | x, advice) - log pi(y | x) ] over the policy tokens y of correct
rollouts that got advice. High reliance means that what is learnt may need the advice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eapo_fast import ops
from eapo_fast.rollout import Rollout
from eapo_fast.training.packing import micro_batches
from eapo_fast.training.update import Updater


def reliance(updater: Updater, rollouts: Sequence[Rollout]) -> float:
    """Return the mean gain in log-probability (nats a token) that the advice brought.

    Both sides are the trunk's log-probabilities at the training temperature, in eval mode. NaN
    without rollouts.
    """
    if not rollouts:
        return float("nan")
    gain = logprobs(updater, rollouts) - logprobs(updater, [without_advice(r) for r in rollouts])
    return float(gain.mean())


def assisted_and_correct(
    rollouts: Sequence[Rollout], accuracies: Sequence[float | None], most: int
) -> list[Rollout]:
    """Return the first `most` rollouts that got advice and are correct."""
    chosen = (
        rollout
        for rollout, accuracy in zip(rollouts, accuracies, strict=True)
        if accuracy == 1.0 and any(s.kind == "expert" for s in rollout.segments)
    )
    return [rollout for _, rollout in zip(range(most), chosen, strict=False)]


def without_advice(rollout: Rollout) -> Rollout:
    """Return the rollout as if its advice had never been there; notices stay."""
    keep = np.ones(len(rollout.token_ids), dtype=bool)
    for segment in rollout.segments:
        if segment.kind == "expert":
            keep[segment.start : segment.stop] = False
    position = np.cumsum(keep) - 1
    where, ids = rollout.banned
    return dataclasses.replace(
        rollout,
        token_ids=rollout.token_ids[keep],
        loss_mask=rollout.loss_mask[keep],
        logprobs=rollout.logprobs[keep],
        segments=[],
        injections=[],
        banned=(position[where].astype(np.int32), ids),
    )


@torch.no_grad()
def logprobs(updater: Updater, rollouts: Sequence[Rollout]) -> Tensor:
    """Return [N] float64 log-probabilities of all policy tokens, in order."""
    training = updater.model.training
    updater.model.eval()
    parts: list[Tensor] = []
    try:
        for batch in micro_batches(
            rollouts,
            [0.0] * len(rollouts),
            token_budget=updater.token_budget,
            device=updater.policy.device,
        ):
            with updater.policy.attention(batch.row):  # type: ignore[attr-defined]
                inputs = updater.head_inputs(updater.policy, batch)
            parts.append(
                ops.linear_token_stats(
                    *inputs,
                    batch.targets,
                    bias=updater.policy.bias,
                    temperature=updater.temperature,
                    softcap=updater.policy.softcap,
                    banned=batch.banned,
                ).logprob.double()
            )
    finally:
        updater.model.train(training)
    return torch.cat(parts)
