"""Help that fades: the consult policy of a run, its turn limit and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.errors import ExpertError
from eapo_fast.experts import (
    STATUSES,
    ConsultPolicy,
    ConsultResult,
    ConsultScheduler,
    Expert,
    Ledger,
    Recorded,
)
from eapo_fast.rewards.leaks import states_answer
from eapo_fast.rollout import Rollout

FAILED = frozenset({"rate", "timeout", "down"})
"""Statuses that are the expert's failure, not the query's and not ours."""
DISPATCHED = frozenset(STATUSES) - {"declined", "budget", "cached", "cancelled"}
"""Statuses of consults that were meant for the expert."""

_COUNTED = ("asked", "sent", "merged", "saved_by_gate", *STATUSES)


def consult_policy(args: EAPOConfig, total_steps: int) -> ConsultPolicy:
    """Return the scheduler's policy that `args` describes."""
    return ConsultPolicy(
        schedule=args.consult_schedule,  # type: ignore[arg-type]
        schedule_offset=args.consult_schedule_offset,
        schedule_power=args.consult_schedule_power,
        floor=args.consult_floor,
        total_steps=total_steps,
        gate=args.consult_gate,  # type: ignore[arg-type]
        timeout=args.expert_timeout,
        step_timeout=args.expert_step_timeout,
        hedge_after=args.expert_hedge_after,
        dedup=args.expert_dedup,  # type: ignore[arg-type]
        answers=args.expert_answers,  # type: ignore[arg-type]
        cache=args.expert_cache,
        record=args.expert_record,
    )


def build_scheduler(
    expert: Expert, args: EAPOConfig, total_steps: int, ledger: Ledger
) -> ConsultScheduler:
    """Return a scheduler of a run; `expert_replay` answers in the expert's place.

    Every scheduler of the run spends from the one `ledger`.
    """
    asked = Recorded(args.expert_replay) if args.expert_replay else expert
    return ConsultScheduler(asked, consult_policy(args, total_steps), ledger, seed=args.seed)


def hit_by_failure(rollouts: Sequence[Rollout], args: EAPOConfig) -> list[bool]:
    """Return which rollouts are left out because the expert failed en masse (`expert_failure`).

    Raises:
        ExpertError: it failed and `expert_failure` is stop.
    """
    failed = [any(_failed(r) for r in rollout.consults) for rollout in rollouts]
    sent = [r for rollout in rollouts for r in rollout.consults if r.status in DISPATCHED]
    share = sum(_failed(r) for r in sent) / len(sent) if sent else 0.0
    if args.expert_failure == "keep" or not share or share < args.expert_failure_share:
        return [False] * len(rollouts)
    if args.expert_failure == "stop":
        counts = Counter(r.status for r in sent if _failed(r))
        raise ExpertError(
            f"the expert failed on {share:.0%} of this generation's consults ({dict(counts)}); "
            f"expert_failure is stop. Resume from the last checkpoint when it answers again"
        )
    if args.expert_failure == "mask":
        return failed
    groups = {r.group_id for r, hit in zip(rollouts, failed, strict=True) if hit}
    return [r.group_id in groups for r in rollouts]


def _failed(result: ConsultResult) -> bool:
    """Whether the expert failed: a key that it refuses is its failure, a question is not."""
    return result.status in FAILED or result.trace.unfit


def leak_flags(rollouts: Sequence[Rollout], golds: Sequence[Any]) -> list[list[bool | None]]:
    """Return for each consult whether its reply states the gold answer; None: there is no gold."""
    return [
        [
            None if gold is None else c.accepted and states_answer(c.text, str(gold))
            for c in r.consults
        ]
        for r, gold in zip(rollouts, golds, strict=True)
    ]


def leak_metrics(
    leaks: Sequence[Sequence[bool | None]],
    rollouts: Sequence[Rollout],
    accuracies: Sequence[float | None],
) -> dict[str, float]:
    """Return the share of accepted replies that state the answer, and accuracy with and without."""
    flags = [
        flag
        for each, rollout in zip(leaks, rollouts, strict=True)
        for flag, result in zip(each, rollout.consults, strict=True)
        if result.accepted and flag is not None
    ]
    kinds: dict[str, list[float]] = {"leaked": [], "unleaked": []}
    for each, accuracy in zip(leaks, accuracies, strict=True):
        if accuracy is not None:
            kinds["leaked" if any(each) else "unleaked"].append(accuracy)
    rate = {"expert/leak_rate": sum(flags) / len(flags)} if flags else {}
    return rate | {f"expert/accuracy_{k}": sum(v) / len(v) for k, v in kinds.items() if v}


def turns_at(step: int, args: EAPOConfig, total_steps: int) -> int:
    """Return the turn limit of a step: `max_turns` falling linearly to 1, then 1 (spec 12)."""
    span = args.turn_contraction * total_steps
    if span <= 0:
        return args.max_turns
    done = min(1.0, (step - 1) / span)
    return round(args.max_turns - (args.max_turns - 1) * done)


@dataclass(slots=True)
class ConsultCounts:
    """What the consults of a run came to, by the scheduler's own counters."""

    totals: Counter[str] = field(default_factory=Counter)

    def take(self, drained: Mapping[str, float]) -> None:
        """Add the scheduler's counters since the last drain."""
        for name in _COUNTED:
            self.totals[name] += int(drained[f"expert/{name}"])

    def summary(self) -> dict[str, Any]:
        """Return totals for the run's summary; `sent` are the calls that reached the expert."""
        totals = self.totals
        return {
            "asked": totals["asked"],
            "sent": totals["sent"],
            "merged": totals["merged"],
            "accepted": totals["ok"] + totals["cached"],
            "saved_by_gate": totals["saved_by_gate"],
            "by_status": {s: totals[s] for s in STATUSES if totals[s]},
        }


def consult_metrics(rollouts: Sequence[Rollout], rho: float, max_turns: int) -> dict[str, float]:
    """Return the `expert/*` metrics of a generation that the rollouts tell."""
    results = [r for rollout in rollouts for r in rollout.consults]
    accepted = sum(r.accepted for r in results)
    blocks = len({(i, q.turn) for i, r in enumerate(rollouts) for q in r.requests})
    reply_tokens = sum(len(r.ids(("expert",))) for r in rollouts)
    return {
        "expert/consult_rate": len(results) / len(rollouts),
        "expert/acceptance": rho,
        "expert/max_turns": float(max_turns),
        "expert/accepted": float(accepted),
        "expert/turns": sum(r.num_turns for r in rollouts) / len(rollouts),
        "expert/queries_per_block": len(results) / blocks if blocks else 0.0,
        "expert/reply_tokens": reply_tokens / accepted if accepted else 0.0,
    }


def accuracy_by_help(
    rollouts: Sequence[Rollout], accuracies: Sequence[float | None]
) -> dict[str, float]:
    """Return accuracy of rollouts that were assisted, refused, or never asked."""
    kinds: dict[str, list[float]] = {"assisted": [], "refused": [], "alone": []}
    for rollout, accuracy in zip(rollouts, accuracies, strict=True):
        if accuracy is None:
            continue
        helped = any(r.accepted for r in rollout.consults)
        kind = "assisted" if helped else "refused" if rollout.consults else "alone"
        kinds[kind].append(accuracy)
    return {f"expert/accuracy_{k}": sum(v) / len(v) for k, v in kinds.items() if v}
