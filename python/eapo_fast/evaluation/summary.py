"""From the records of the problems to the numbers of the evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eapo_fast.evaluation.bootstrap import RESAMPLES, intervals
from eapo_fast.evaluation.estimators import (
    any_at_k,
    majority,
    mean_at_n,
    unbiased_variance,
    variance,
)
from eapo_fast.evaluation.records import GROUP_COLUMNS
from eapo_fast.evaluation.store import Record
from eapo_fast.reporting.stats import wilson

Estimate = dict[str, Any]
"""value, and low and high of its 95 % interval over problems (None where there is none)."""
_MOST_GROUPS = 20


def summarise(records: Sequence[Record], *, seed: int = 0) -> dict[str, Any]:
    """Return every figure of an evaluation as JSON values.

    Args:
        records: One for each problem, see `records.problem_record`; all with n samples.
        seed: Key of the bootstrap. One draw of problems serves all figures.
    """
    scores = np.array([r["correct"] for r in records], dtype=np.float64)
    summary: dict[str, Any] = {"problems": len(records), "n": scores.shape[1]}
    summary |= _accuracies(records, scores, seed)
    samples = scores.size
    undecided = np.array([r["undecided"] for r in records])
    summary |= {
        "undecided": float(undecided.mean()),
        "no_answer": sum(a is None for r in records for a in r["answers"]) / samples,
        "truncated": _share(records, "length"),
        "finish": {k: v / samples for k, v in sorted(_finishes(records).items())},
        "tokens": _lengths(records, scores),
        "consults": consult_statistics(records),
        "by": {name: group for name in GROUP_COLUMNS if (group := _groups(records, name, seed))},
        "solve_rate": [float(p) for p in mean_at_n(scores)],
    }
    return summary


def votes(records: Sequence[Record]) -> NDArray[np.float64]:
    """Return the chance that a vote is right, [P]."""
    return np.array([majority(r["classes"], [bool(c) for c in r["correct"]]) for r in records])


def _accuracies(
    records: Sequence[Record], scores: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    n = scores.shape[1]
    columns = np.column_stack(
        [mean_at_n(scores), votes(records), variance(scores), any_at_k(scores)]
    )
    mean, vote, spread, *ks = estimates(columns, seed=seed, shares=[0, 1, *range(3, n + 3)])
    unbiased = float(unbiased_variance(scores).mean())
    return {
        "mean_at_n": mean,
        "any_at_n": ks[-1],
        "maj_at_n": vote,
        "var": spread,
        "var_unbiased": None if math.isnan(unbiased) else unbiased,
        "any_at_k": [e["value"] for e in ks],
        "any_at_k_low": [e["low"] for e in ks],
        "any_at_k_high": [e["high"] for e in ks],
        "interval": f"95 %, bootstrap over problems, {RESAMPLES} resamples",
    }


def estimates(
    columns: NDArray[np.float64], *, seed: int, shares: Sequence[int] = ()
) -> list[Estimate]:
    """Return mean and interval of each column, [P, M] -> M.

    Columns in `shares` are in [0, 1]; where all problems have one value they get Wilson's interval,
    since resampling equal values would give none.
    """
    bounds = intervals(columns, seed=seed)
    found = []
    for index, (column, (low, high)) in enumerate(zip(columns.T, bounds, strict=True)):
        value = float(column.mean())
        if np.ptp(column) == 0.0:
            value = float(column[0])
            low, high = wilson(value * len(column), len(column)) if index in shares else (None,) * 2
        found.append({"value": value, "low": _number(low), "high": _number(high)})
    return found


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _finishes(records: Sequence[Record]) -> Counter[str]:
    return Counter(reason for r in records for reason in r["finish"])


def _share(records: Sequence[Record], reason: str) -> float:
    counts = _finishes(records)
    return counts[reason] / counts.total()


def _lengths(records: Sequence[Record], scores: NDArray[np.float64]) -> dict[str, Any]:
    """Policy tokens of all samples, and means of the right and the wrong ones."""
    tokens = np.array([r["tokens"] for r in records], dtype=np.float64)
    right = scores == 1.0
    return {
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p90": float(np.quantile(tokens, 0.9)),
        "max": int(tokens.max()),
        "mean_correct": float(tokens[right].mean()) if right.any() else None,
        "mean_wrong": float(tokens[~right].mean()) if not right.all() else None,
    }


def consult_statistics(records: Sequence[Record]) -> dict[str, Any]:
    """Return what the samples asked, per sample, and how right they were with and without help."""
    samples = sum(len(r["correct"]) for r in records)
    consults = [c for r in records for c in r.get("consults", ())]
    statuses: Counter[str] = Counter()
    for consult in consults:
        statuses.update(consult["statuses"])
    asked, accepted = (sum(c[name] for c in consults) for name in ("asked", "accepted"))
    blocks = sum(c["blocks"] for c in consults)
    return {
        "asked_per_sample": asked / samples,
        "accepted_per_sample": accepted / samples,
        "blocks_per_sample": blocks / samples,
        "queries_per_block": asked / blocks if blocks else None,
        "accepted_share": accepted / asked if asked else None,
        "samples_that_asked": sum(c["asked"] > 0 for c in consults) / samples,
        "reply_tokens_per_sample": sum(c["reply_tokens"] for c in consults) / samples,
        "by_status": dict(sorted(statuses.items())),
        "accuracy": _accuracy_by_help(records),
    }


def _accuracy_by_help(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[int]] = {"assisted": [], "refused": [], "alone": []}
    for record in records:
        consults = record.get("consults") or [None] * len(record["correct"])
        for correct, consult in zip(record["correct"], consults, strict=True):
            asked = consult is not None and consult["asked"] > 0
            helped = consult is not None and consult["accepted"] > 0
            kinds["assisted" if helped else "refused" if asked else "alone"].append(correct)
    return {
        kind: {"samples": len(values), "accuracy": sum(values) / len(values)}
        for kind, values in kinds.items()
        if values
    }


def _groups(records: Sequence[Record], column: str, seed: int) -> list[dict[str, Any]]:
    """Return mean@n of each value of a column, in order; [] if it does not divide the problems."""
    members: dict[Any, list[Record]] = {}
    for record in records:
        members.setdefault(record.get(column), []).append(record)
    if not 2 <= len(members) <= _MOST_GROUPS:
        return []
    return [
        _group(label, members[label], seed) for label in sorted(members, key=lambda v: _order(v))
    ]


def _group(label: Any, records: Sequence[Record], seed: int) -> dict[str, Any]:
    scores = np.array([r["correct"] for r in records], dtype=np.float64)
    columns = np.column_stack([mean_at_n(scores), any_at_k(scores)[:, -1]])
    mean, best = estimates(columns, seed=seed, shares=[0, 1])
    return {
        "value": "none" if label is None else label,
        "problems": len(records),
        "mean_at_n": mean,
        "any_at_n": best,
    }


def _order(label: Any) -> tuple[int, float, str]:
    """Numbers by size, then words; a missing label last."""
    if label is None:
        return 2, 0.0, ""
    if isinstance(label, Mapping) or not isinstance(label, int):
        return 1, 0.0, str(label)
    return 0, float(label), ""
