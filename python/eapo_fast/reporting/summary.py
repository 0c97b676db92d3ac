"""The last lines of a run: what was learnt, what help cost, where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_fast.reporting.metrics import Row, series
from eapo_fast.reporting.stats import clock, percent, wilson

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PHASES", "STATUSES", "print_summary", "summarise", "summary_lines", "wilson"]

STATUSES = (
    "ok",
    "cached",
    "declined",
    "budget",
    "rate",
    "timeout",
    "down",
    "refused",
    "malformed",
    "too_long",
    "cancelled",
)
"""The closed list of consult statuses."""

PHASES = ("setup", "rollout", "reward", "update", "evaluation", "other")
"""Phases of the wall time, in the order of the lifecycle."""

ARROW = "->"


def print_summary(summary: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print the closing lines for a summary (the contents of `summary.json`).

    Keys that are absent leave their line out, so that a run without an expert or without an
    evaluation prints what it has.
    """
    from rich.console import Console
    from rich.text import Text

    out = console or Console(highlight=False, soft_wrap=True)
    out.print()
    for label, text in summary_lines(summary):
        out.print(Text.assemble((f"{label:<15}", "bold cyan"), text))


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`(label, text)` pairs that `print_summary` prints, without colours."""
    lines = [
        ("solo accuracy", _accuracy_text(summary.get("solo_before"), summary.get("solo_after"))),
        ("consults", _consult_text(summary.get("consults") or {})),
        ("wall time", _time_text(summary.get("seconds") or {}, summary.get("steps"))),
        ("results", _results_text(summary.get("run_dir"))),
    ]
    return [(label, text) for label, text in lines if text]


def summarise(rows: Sequence[Row], **known: Any) -> dict[str, Any]:
    """A summary from the metrics alone, for a run that was stopped before it wrote its own.

    Solo accuracy comes from the first and the last evaluation; consult counts and seconds are
    summed over the steps (a row holds the means since the row before). `known` overrides any key.
    """
    asked = _total(rows, "expert/asked")
    accepted = _total(rows, "expert/ok") + _total(rows, "expert/cached")
    by_status = {name: round(_total(rows, f"expert/{name}")) for name in STATUSES}
    evaluations = [row for row in rows if row.get("eval_solo_accuracy") is not None]
    seconds = {name: _total(rows, f"perf/{name}_s") for name in ("rollout", "reward", "update")}
    total = _total(rows, "perf/step_s")
    summary: dict[str, Any] = {
        "solo_before": _evaluation(evaluations[0]) if evaluations else None,
        "solo_after": _evaluation(evaluations[-1]) if evaluations else None,
        "consults": {
            "asked": round(asked),
            "sent": round(_total(rows, "expert/sent")),
            "accepted": round(accepted),
            "saved_by_gate": round(_total(rows, "expert/saved_by_gate")),
            "by_status": {name: count for name, count in by_status.items() if count},
        },
        "seconds": {
            **seconds,
            "other": max(0.0, total - sum(seconds.values())),
            "total": total,
        },
        "steps": max((int(row.get("step", 0)) for row in rows), default=0),
    }
    return summary | known


def _results_text(run_dir: str | None) -> str:
    """The directory and which of its parts are there."""
    if not run_dir:
        return ""
    names = ("report.html", "curves.png", "metrics.jsonl", "rollouts/", "final/")
    found = ", ".join(name for name in names if (Path(run_dir) / name).exists())
    return f"{run_dir}/  ({found})" if found else f"{run_dir}/"


def _total(rows: Sequence[Row], name: str) -> float:
    """Sum over the steps: each row holds the mean of the steps since the row before it."""
    total, before = 0.0, 0
    for step, value in zip(*series(rows, name), strict=True):
        total += value * max(1, step - before)
        before = step
    return total


def _evaluation(row: Row) -> dict[str, Any]:
    return {
        "accuracy": row["eval_solo_accuracy"],
        "low": row.get("eval_solo_accuracy_low"),
        "high": row.get("eval_solo_accuracy_high"),
        "n": row.get("eval_solo_n"),
    }


def _accuracy_text(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    if not before or not after:
        return ""
    points = 100 * (after["accuracy"] - before["accuracy"])
    text = f"{_with_interval(before)} {ARROW} {_with_interval(after)}, {points:+.1f} points"
    n = after.get("n")
    return f"{text}  (95 % intervals, {n:,.0f} held-apart problems)" if n else text


def _with_interval(solo: Mapping[str, Any]) -> str:
    low, high = solo.get("low"), solo.get("high")
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return percent(solo["accuracy"]) + interval


def _consult_text(consults: Mapping[str, Any]) -> str:
    asked = consults.get("asked", 0)
    if not asked:
        return ""
    bought, saved = consults.get("sent", 0), consults.get("saved_by_gate", 0)
    text = f"{bought:,} bought, {saved:,} saved by early gating, of {asked:,} asked"
    return f"{text}; {consults.get('accepted', 0):,} accepted"


def _time_text(seconds: Mapping[str, float], steps: int | None) -> str:
    total = seconds.get("total")
    if not total:
        return ""
    parts = [f"{name} {clock(seconds[name])}" for name in PHASES if seconds.get(name, 0) >= 0.5]
    text = clock(total) + (f" for {steps} steps" if steps else "")
    return f"{text}: {', '.join(parts)}" if parts else text
