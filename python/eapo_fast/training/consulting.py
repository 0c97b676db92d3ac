"""Help that fades: the consult policy of a run, its turn limit and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.experts import STATUSES, ConsultPolicy, ConsultScheduler, Expert, Recorded
from eapo_fast.rollout import Rollout

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
        cache=args.expert_cache,
        record=args.expert_record,
    )


def build_scheduler(expert: Expert, args: EAPOConfig, total_steps: int) -> ConsultScheduler:
    """Return the scheduler of a run; `expert_replay` answers in the expert's place."""
    asked = Recorded(args.expert_replay) if args.expert_replay else expert
    return ConsultScheduler(
        asked, consult_policy(args, total_steps), args.expert_budget, seed=args.seed
    )


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
