"""What depends on the clock, kept apart from the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eapo_fast.evaluation.store import Record
from eapo_fast.rollout import Rollout


def timing_of(first: int, rollouts: Sequence[Rollout], seconds: float) -> Record:
    """Return the line of `timing.jsonl` of one chunk; costs are in the expert's currency."""
    results = [r for rollout in rollouts for r in rollout.consults]
    return {
        "first": first,
        "seconds": seconds,
        "policy_tokens": sum(r.num_policy_tokens for r in rollouts),
        "consult_cost": sum(r.cost for r in results),
        "consult_latency": [round(r.latency, 6) for r in results if r.accepted],
    }


def timing_summary(lines: Sequence[Record]) -> dict[str, Any]:
    """Return seconds, tokens per second, cost, and percentiles of the expert's latency."""
    seconds = sum(line["seconds"] for line in lines)
    tokens = sum(line["policy_tokens"] for line in lines)
    latencies = sorted(value for line in lines for value in line["consult_latency"])
    return {
        "seconds": seconds,
        "policy_tokens": tokens,
        "policy_tokens_per_s": tokens / seconds if seconds else 0.0,
        "consult_cost": sum(line["consult_cost"] for line in lines),
        "consult_latency_p50": _rank(latencies, 0.50),
        "consult_latency_p99": _rank(latencies, 0.99),
    }


def _rank(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
