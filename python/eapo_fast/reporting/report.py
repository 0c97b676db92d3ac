"""`report.html`: one self-contained page about a run, readable years later without a server.

The page loads nothing from outside. Rollouts travel as JSON inside it and are put on screen as
text nodes, never as markup, so nothing that a model or an expert wrote can run in the browser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from eapo_fast.errors import DataError
from eapo_fast.reporting.charts import render_charts
from eapo_fast.reporting.metrics import Row, read_jsonl
from eapo_fast.reporting.panels import last_step
from eapo_fast.reporting.stats import clock, compact, percent
from eapo_fast.reporting.summary import PHASES, summarise

MAX_ROLLOUTS = 4000
"""Most rollouts in a page (about a kilobyte each); steps are thinned evenly above it."""


def write_report(run_dir: str | Path, *, max_rollouts: int = MAX_ROLLOUTS) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    Reads `metrics.jsonl`, `rollouts/*.jsonl` and `summary.json`; any but one may be missing, so a
    run that is still going on or was stopped has a page too. Raises `DataError` when the
    directory holds none of them.
    """
    run = Path(run_dir)
    rows = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    rollouts = _read_rollouts(run, last_step(rows) if rows else None)
    stored = _read_summary(run)
    if not (rows or rollouts or stored):
        raise DataError(
            f"{run} is not a run directory: it has no metrics.jsonl, rollouts/ or summary.json"
        )
    summary = {**summarise(rows), **stored}
    kept = thin(rollouts, max_rollouts)
    page = Template(_asset("report.html")).substitute(
        title=escape(_title(run, summary)),
        facts=_facts(summary),
        cards="\n".join(_cards(summary, rows)),
        charts=render_charts(rows),
        phases=_phase_bar(summary.get("seconds") or {}),
        note=escape(_kept_note(len(kept), len(rollouts))),
        style=_asset("report.css"),
        script=_asset("report.js"),
        data=embed_json(_clean(kept)),
    )
    target = run / "report.html"
    scratch = target.with_name("report.html.tmp")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(target)
    return target


def embed_json(value: Any) -> str:
    """JSON that cannot end the `<script>` element it stands in, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def thin(rollouts: Sequence[Row], limit: int) -> list[Row]:
    """At most about `limit` rollouts: whole steps, evenly spread, first and last always kept."""
    steps: dict[tuple[bool, int], list[Row]] = {}
    for rollout in rollouts:
        steps.setdefault(_order(rollout), []).append(rollout)
    if len(rollouts) <= limit or len(steps) <= 2:
        return list(rollouts)
    keys = sorted(steps)
    count = max(2, min(len(keys), limit * len(keys) // len(rollouts)))
    picked = {round(i * (len(keys) - 1) / (count - 1)) for i in range(count)}
    return [rollout for i in sorted(picked) for rollout in steps[keys[i]]]


def _read_rollouts(run: Path, last: int | None) -> list[Row]:
    """All rollouts up to the last logged step (files beyond it belong to an earlier run).

    Training comes before evaluation, both in the order of the steps.
    """
    paths = sorted((run / "rollouts").glob("*.jsonl"))
    rows = [row for path in paths for row in read_jsonl(path)]
    return sorted((row for row in rows if last is None or row.get("step", 0) <= last), key=_order)


def _order(rollout: Row) -> tuple[bool, int]:
    return rollout.get("split") == "eval", int(rollout.get("step", 0))


def _read_summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it and try again") from error
    return dict(summary)


def _asset(name: str) -> str:
    return files("eapo_fast.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def _title(run: Path, summary: Mapping[str, Any]) -> str:
    return Path(str(summary.get("run_dir") or run)).name or str(run)


def _facts(summary: Mapping[str, Any]) -> str:
    wanted = (("recipe", "recipe"), ("model", "model"), ("seed", "seed"), ("steps", "steps"))
    facts = [(label, summary[key]) for key, label in wanted if summary.get(key) is not None]
    total = (summary.get("seconds") or {}).get("total")
    if total:
        facts.append(("wall time", clock(total)))
    return "".join(f"<span>{escape(label)} <b>{escape(str(v))}</b></span>" for label, v in facts)


def _cards(summary: Mapping[str, Any], rows: Sequence[Row]) -> Iterable[str]:
    before, after = summary.get("solo_before"), summary.get("solo_after")
    if before and after:
        points = 100 * (after["accuracy"] - before["accuracy"])
        yield _card(
            "Solo accuracy",
            f"{percent(before['accuracy'])} <i>&rarr;</i> {percent(after['accuracy'])}",
            f"{points:+.1f} points on {after.get('n') or 0:,.0f} held-apart problems",
            f"95 % intervals {_interval(before)} and {_interval(after)}",
            "good" if points > 0 else "bad",
        )
    consults = summary.get("consults") or {}
    if consults.get("asked"):
        sent, saved = consults.get("sent", 0), consults.get("saved_by_gate", 0)
        yield _card(
            "Consults bought",
            f"{sent:,} <i>of</i> {consults['asked']:,}",
            f"{saved:,} saved by gating before dispatch",
            ", ".join(f"{name} {n:,}" for name, n in (consults.get("by_status") or {}).items()),
        )
    rates = [
        row["expert/consult_rate"] for row in rows if row.get("expert/consult_rate") is not None
    ]
    if rates:
        first, last = _ends(rates)
        yield _card("Consults per rollout", f"{first:.2f} <i>&rarr;</i> {last:.2f}",
                    "mean of the first and of the last tenth of the steps")  # fmt: skip
    speeds = sorted(r["perf/tokens_per_s"] for r in rows if r.get("perf/tokens_per_s") is not None)
    if speeds:
        yield _card("Speed", f"{compact(speeds[len(speeds) // 2])} <i>tokens/s</i>",
                    "median over the steps")  # fmt: skip


def _card(label: str, value: str, note: str, detail: str = "", tone: str = "") -> str:
    """`value` is markup made here; `note` and `detail` are text."""
    more = f"<small>{escape(detail)}</small>" if detail else ""
    return (
        f'<div class="card"><h3>{escape(label)}</h3><p class="value">{value}</p>'
        f'<p class="note {tone}">{escape(note)}</p>{more}</div>'
    )


def _interval(solo: Mapping[str, Any]) -> str:
    low, high = solo.get("low"), solo.get("high")
    return "unknown" if low is None or high is None else f"{100 * low:.1f}-{100 * high:.1f} %"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _phase_bar(seconds: Mapping[str, float]) -> str:
    parts = [(name, seconds.get(name) or 0.0) for name in PHASES]
    total = sum(value for _, value in parts)
    if total <= 0:
        return ""
    shown = [(i, name, value) for i, (name, value) in enumerate(parts) if value / total >= 0.002]
    bar = "".join(f'<i class="p{i}" style="flex-grow:{value:.3f}"></i>' for i, _, value in shown)
    keys = "".join(
        f'<span><i class="p{i}"></i>{name} <b>{_seconds(value)}</b> {value / total:.0%}</span>'
        for i, name, value in shown
    )
    body = f'<div class="bar">{bar}</div><p>{keys}</p>'
    return f'<section class="phases"><h2>Wall time</h2>{body}</section>'


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else clock(value)


def _kept_note(kept: int, total: int) -> str:
    if kept == total:
        return ""
    return f"{kept:,} of {total:,} rollouts are in this page; all are in rollouts/*.jsonl"


def _clean(value: Any) -> Any:
    """`value` without the numbers that JSON cannot hold (they become null)."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
