"""Help that fades: the consult policy of a run, its turn limit and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.experts import STATUSES, ConsultPolicy, ConsultScheduler, Expert, Recorded
from eapo_fast.rollout import Rollout


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
    """What the consults of a run came to."""

    by_status: Counter[str] = field(default_factory=Counter)

    def add(self, rollouts: Sequence[Rollout], rho: float, max_turns: int) -> dict[str, float]:
        """Count a generation's consults; returns its `expert/*` metrics."""
        statuses = Counter(r.status for rollout in rollouts for r in rollout.consults)
        self.by_status.update(statuses)
        asked = sum(statuses.values())
        accepted = sum(n for s, n in statuses.items() if s in ("ok", "cached"))
        blocks = len({(i, q.turn) for i, r in enumerate(rollouts) for q in r.requests})
        reply_tokens = sum(len(r.ids(("expert",))) for r in rollouts)
        metrics = {
            "expert/consult_rate": asked / len(rollouts),
            "expert/acceptance": rho,
            "expert/max_turns": float(max_turns),
            "expert/asked": float(asked),
            "expert/accepted": float(accepted),
            "expert/accepted_share": accepted / asked if asked else 0.0,
            "expert/saved_by_gate": float(statuses["declined"]),
            "expert/turns": sum(r.num_turns for r in rollouts) / len(rollouts),
            "expert/queries_per_block": asked / blocks if blocks else 0.0,
            "expert/reply_tokens": reply_tokens / accepted if accepted else 0.0,
        }
        return metrics | {f"expert/{s}": float(statuses[s]) for s in STATUSES if statuses[s]}

    def summary(self) -> dict[str, Any]:
        """Return totals for the run's summary."""
        asked = sum(self.by_status.values())
        accepted = self.by_status["ok"] + self.by_status["cached"]
        declined = self.by_status["declined"]
        return {
            "asked": asked,
            "sent": asked - declined,
            "accepted": accepted,
            "saved_by_gate": declined,
            "by_status": dict(self.by_status),
        }

    def accuracy_by_help(
        self, rollouts: Sequence[Rollout], accuracies: Sequence[float | None]
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
