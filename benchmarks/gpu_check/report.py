"""The JSON of a run and its printed table, each figure beside its bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BAD = ("failed", "crashed", "timed out")
"""States of a stage that make the command fail."""


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)  # noqa: PTH105


def table(report: Mapping[str, Any]) -> str:
    """Return the run as text: stages, failed checks, what was skipped, figures.

    What matters most comes last, where a long output is cut off: the bars, what failed, the sum.
    """
    lines = [_head(report), ""]
    for outcome in report["stages"]:
        lines += _stage(outcome)
    records = [r for outcome in report["stages"] for r in outcome["records"]]
    barred = [r for r in records if r["kind"] == "figure" and r["passed"] is not None]
    if barred:
        barred.sort(key=lambda record: not record["passed"])
        lines += ["", "Bars:", *map(_figure, barred)]
    lines += [f"FAILED  {r['name']}" for r in records if r["kind"] == "check" and not r["passed"]]
    lines += ["", _head(report), _summary(report)]
    return "\n".join(lines)


def exit_code(report: Mapping[str, Any]) -> int:
    """Return 1 where a stage went wrong or nothing was checked; a missed bar is no error."""
    kinds = {r["kind"] for outcome in report["stages"] for r in outcome["records"]}
    bad = any(outcome["status"] in BAD for outcome in report["stages"])
    return int(bad or not kinds & {"check", "figure"})


def _head(report: Mapping[str, Any]) -> str:
    found = report.get("environment", {})
    where = found.get("gpu") or f"{found.get('cpu', '?')} (no GPU)"
    return (
        f"{where} | torch {found.get('torch', '?')} | commit {report['commit']} | "
        f"seed {report['seed']} | {report['seconds']:.0f} s"
    )


def _stage(outcome: Mapping[str, Any]) -> list[str]:
    records: Sequence[Mapping[str, Any]] = outcome["records"]
    checks = [r for r in records if r["kind"] == "check"]
    good = sum(r["passed"] for r in checks)
    counted = f", {good} of {len(checks)} checks" if checks else ""
    lines = [f"{outcome['stage']}: {outcome['status']} in {outcome['seconds']:.1f} s{counted}"]
    lines += [f"  FAILED  {r['name']}  {_detail(r)}" for r in checks if not r["passed"]]
    lines += [_figure(r) for r in records if r["kind"] == "figure"]
    lines += [f"  skipped  {r['name']}: {r['reason']}" for r in records if r["kind"] == "skip"]
    if outcome.get("message"):
        lines += [f"  | {line}" for line in outcome["message"].splitlines()[-12:]]
    return lines


def _figure(record: Mapping[str, Any]) -> str:
    verdict = {True: "pass", False: "MISS", None: ""}[record["passed"]]
    value = f"{record['value']:.4g} {record['unit']}"
    return f"  {record['name']:<58} {value:>16}  {record['bar']:<14} {verdict}".rstrip()


def _detail(record: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in record.items() if k not in ("kind", "name", "passed")}
    return json.dumps(shown)[:500]


def _summary(report: Mapping[str, Any]) -> str:
    records = [r for outcome in report["stages"] for r in outcome["records"]]
    checks = [r["passed"] for r in records if r["kind"] == "check"]
    bars = [r["passed"] for r in records if r["kind"] == "figure" and r["passed"] is not None]
    bad = [o["stage"] for o in report["stages"] if o["status"] in BAD]
    left_out = [o["stage"] for o in report["stages"] if o["status"] == "skipped"]
    parts = [
        f"{sum(checks)} of {len(checks)} checks hold, {sum(bars)} of {len(bars)} bars are reached",
        f"not in order: {', '.join(bad)}" if bad else "",
        f"skipped: {', '.join(left_out)}" if left_out else "",
    ]
    if not bad and not left_out:
        parts.append("all stages in order")
    return "; ".join(part for part in parts if part)
