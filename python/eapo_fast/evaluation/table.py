"""Several evaluations of the same problems side by side: the paper's comparison table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eapo_fast.errors import ConfigError
from eapo_fast.evaluation.estimators import mean_at_n
from eapo_fast.evaluation.report import interval_text
from eapo_fast.evaluation.store import Record, read_result
from eapo_fast.evaluation.summary import estimates
from eapo_fast.reporting.stats import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#8a93a3", "#c77d0a", "#7a5195", "#2a9d6f", "#2f6fde", "#c0392b")
_SAME = ("n", "temperature", "top_p", "top_k", "max_tokens", "system_prompt")


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table."""

    title: str
    result: Mapping[str, Any]
    records: list[Record]

    @property
    def figures(self) -> dict[str, Any]:
        """The results, without the list of all problems."""
        return {k: v for k, v in self.result["results"].items() if k != "solve_rate"}

    @property
    def scores(self) -> NDArray[np.float64]:
        """[P, n] 1 for a correct sample."""
        return np.array([r["correct"] for r in self.records], dtype=np.float64)


def write_table(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write `table.md`, `table.json` and `table.png` into `out`; returns the page's path.

    Differences are to the first folder, paired by problem: one bootstrap draw of problems for both.

    Raises:
        ConfigError: a folder holds no finished evaluation, or two of them measured other problems
            or sampled in another way.
    """
    entries = _entries(folders)
    gains = _gains(entries)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    page = target / "table.md"
    page.write_text(_page(entries, gains), encoding="utf-8")
    rows = [
        {"title": e.title, "folder": Path(e.result["folder"]).name, "gain": gain, **e.figures}
        for e, gain in zip(entries, gains, strict=True)
    ]
    (target / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    _draw(entries, gains, target / "table.png")
    return page


def _entries(folders: Sequence[str | Path]) -> list[Entry]:
    entries: list[Entry] = []
    for folder in folders:
        result, records = read_result(folder)
        if entries:
            _check_alike(entries[0].result, result, folders[0], folder)
        taken = {e.title for e in entries}
        title = result["title"]
        entries.append(
            Entry(
                title if title not in taken else f"{title} ({Path(folder).name})", result, records
            )
        )
    return entries


def _check_alike(
    first: Mapping[str, Any], other: Mapping[str, Any], one: str | Path, two: str | Path
) -> None:
    changed = [
        f"{name} {first['settings'][name]!r} and {other['settings'][name]!r}"
        for name in _SAME
        if first["settings"][name] != other["settings"][name]
    ]
    if first["digests"]["data"] != other["digests"]["data"]:
        changed.insert(0, "other problems")
    if changed:
        raise ConfigError(f"{one} and {two} cannot be compared: {', '.join(changed)}")


def _gains(entries: Sequence[Entry]) -> list[dict[str, Any] | None]:
    """Return the paired difference of mean@n to the first row, None for that row itself."""
    base = mean_at_n(entries[0].scores)
    gains: list[dict[str, Any] | None] = [None]
    for entry in entries[1:]:
        column = (mean_at_n(entry.scores) - base)[:, None]
        gains += estimates(column, seed=int(entry.result["settings"]["seed"]))
    return gains


def _page(entries: Sequence[Entry], gains: Sequence[Mapping[str, Any] | None]) -> str:
    first = entries[0].result
    results, settings = first["results"], first["settings"]
    n = results["n"]
    head = [
        "method", f"mean@{n}", f"to {entries[0].title}", f"any@{n}", f"maj@{n}", "Var", "tokens",
        "cut off", "consults",
    ]  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for entry, gain in zip(entries, gains, strict=True):
        lines.append(" | ".join(_cells(entry, gain)))
    return (
        f"# {Path(first['data']).name}: {results['problems']} problems, {n} samples each\n\n"
        f"Temperature {settings['temperature']:g}, top-p {settings['top_p']:g}. In brackets: 95 % "
        f"intervals, bootstrap over problems; differences are paired by problem, in points.\n\n"
        + "\n".join(f"| {line} |" for line in lines)
        + "\n\n![accuracy and pass@k of every method](table.png)\n"
    )


def _cells(entry: Entry, gain: Mapping[str, Any] | None) -> list[str]:
    r = entry.result["results"]
    consults = r["consults"]["accepted_per_sample"]
    return [
        entry.title,
        interval_text(r["mean_at_n"]),
        "" if gain is None else _points(gain),
        interval_text(r["any_at_n"]),
        interval_text(r["maj_at_n"]),
        f"{r['var']['value']:.4f}",
        compact(r["tokens"]["mean"]),
        f"{100 * r['truncated']:.1f} %",
        f"{consults:.2f}" if entry.result["kind"] == "assisted" else "none",
    ]


def _points(gain: Mapping[str, Any]) -> str:
    text = f"{100 * gain['value']:+.1f}"
    if gain["low"] is None:
        return text
    return f"{text} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


def _draw(entries: Sequence[Entry], gains: Sequence[Mapping[str, Any] | None], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from eapo_fast.reporting.curves import STYLE

    repeated = entries[0].result["results"]["n"] > 1
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05)
    with rc_context(STYLE):
        size = (10.4 if repeated else 6.4, max(3.6, 1.6 + 0.42 * len(entries)))
        figure = Figure(figsize=size, dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2 if repeated else 1, squeeze=False)[0]
        _draw_means(panels[0], entries, gains)
        if repeated:
            _draw_curves(panels[1], entries)
        figure.savefig(path)


def _draw_means(
    axes: Axes, entries: Sequence[Entry], gains: Sequence[Mapping[str, Any] | None]
) -> None:
    from eapo_fast.evaluation.picture import percent_axis, titled

    n = entries[0].result["results"]["n"]
    titled(axes, f"mean@{n}", "line: 95 %, bootstrap over problems; right: paired difference")
    reach = 0.05
    for place, (entry, gain) in enumerate(zip(entries, gains, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        value, low, high = (
            entry.result["results"]["mean_at_n"][k] for k in ("value", "low", "high")
        )
        if low is not None:
            axes.plot([low, high], [place, place], color=colour, lw=2)
        axes.plot([value], [place], "o", color=colour, ms=7)
        axes.annotate(
            f"{100 * value:.1f} %", (value, place), (0, 7), textcoords="offset points",
            ha="center", fontsize=8.5,
        )  # fmt: skip
        axes.text(
            1.02, place, "" if gain is None else _points(gain), va="center", fontsize=8.5,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        reach = max(reach, high or value)
    axes.set_yticks(range(len(entries)), [e.title for e in entries])
    for place, label in enumerate(axes.get_yticklabels()):
        label.set_color(COLOURS[place % len(COLOURS)])
        label.set_fontweight("bold")
    axes.set_ylim(len(entries) - 0.5, -0.6)
    axes.set_xlim(0, min(1.0, 1.08 * reach))
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    percent_axis(axes.xaxis)


def _draw_curves(axes: Axes, entries: Sequence[Entry]) -> None:
    from eapo_fast.evaluation.picture import any_axis, percent_axis, titled

    titled(axes, "Solved with k tries", "pass@k, unbiased; colours as at the left")
    n = entries[0].result["results"]["n"]
    top = 0.05
    for place, entry in enumerate(entries):
        values = entry.result["results"]["any_at_k"]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(range(1, n + 1), values, color=colour, lw=2)
        top = max(top, *values)
    axes.set_ylim(0, min(1.0, 1.08 * top))
    any_axis(axes, n)
    percent_axis(axes.yaxis)
