"""`evaluation.png`: pass@k, how evenly problems are solved, accuracy by group, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eapo_fast.evaluation.settings import model_name
from eapo_fast.reporting.curves import COLOURS, INK, MUTED, STYLE
from eapo_fast.reporting.stats import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY = COLOURS
AMBER = "#c77d0a"
_LABEL_CHARS = 24


def draw_evaluation(result: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the figures of `evaluation.json` and return the path of the picture."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    results = result["results"]
    panels = _panels(results)
    rows = sum(len(g) for g in results["by"].values()) + len(results["by"])
    height = max(3.9, 1.5 + 0.27 * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    with rc_context(STYLE):
        width = max(4.2 * len(panels) + 0.4, 6.6)
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        _headline(figure, result)
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(places, panels, strict=True):
            panel(axes, results)
        figure.savefig(path)
    return Path(path)


def _panels(results: Mapping[str, Any]) -> list[Any]:
    repeated = [_draw_any_at_k, _draw_solve_rate] if results["n"] > 1 else []
    return [*repeated, *([_draw_groups] if results["by"] or not repeated else [])]


def _headline(figure: Figure, result: Mapping[str, Any]) -> None:
    results = result["results"]
    n = results["n"]
    samples = f"{n} samples" if n > 1 else "1 sample"
    model, data = model_name(result["model"]), Path(str(result["data"])).name
    figure.suptitle(
        f"{result['title']}: {model} on {data}  ({results['problems']} problems, {samples} each)",
        x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK,
    )  # fmt: skip
    tokens, consults = results["tokens"], results["consults"]
    facts = [
        f"{compact(tokens['mean'])} tokens a sample",
        f"{100 * results['truncated']:.1f} % cut off",
        f"{100 * results['no_answer']:.1f} % without an answer",
        f"{100 * results['undecided']:.1f} % undecided",
    ]
    if result["kind"] == "assisted":
        facts.append(f"{consults['accepted_per_sample']:.1f} consults answered a sample")
    figure.supxlabel("   ·   ".join(facts), x=0.012, ha="left", fontsize=8.5, color=MUTED)


def titled(axes: Axes, title: str, under: str) -> None:
    """Write a panel's title and the small line under it."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.text(0, 1.03, under, transform=axes.transAxes, color=MUTED, fontsize=8.5)


def percent_axis(axis: Any) -> None:
    """Label shares in per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def any_axis(axes: Axes, n: int) -> None:
    """Scale the k of pass@k: doubling steps from 1 to n."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, n)
    ticks = sorted({*(2**i for i in range(11) if 2**i <= n / 1.5), n})
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("k")


def _draw_any_at_k(axes: Axes, results: Mapping[str, Any]) -> None:
    """The curve with its band; the first point is mean@n, and the vote stands at k = n."""
    n = results["n"]
    ks = np.arange(1, n + 1)
    values = np.array(results["any_at_k"], dtype=float)
    low, high = (np.array(results[f"any_at_k_{end}"], dtype=float) for end in ("low", "high"))
    titled(axes, "Solved with k tries", "pass@k, unbiased; band: 95 %, bootstrap over problems")
    axes.fill_between(ks, low, high, color=BLUE, alpha=0.15, lw=0)
    axes.plot(ks, values, color=BLUE, lw=2, marker="o" if n <= 8 else None, ms=4)
    mean, best, vote = (results[name] for name in ("mean_at_n", "any_at_n", "maj_at_n"))
    marks = (
        (1, mean, "o", BLUE, f"mean@{n}"),
        (n, best, "s", BLUE, f"any@{n}"),
        (n, vote, "D", AMBER, f"maj@{n}"),
    )
    for k, estimate, marker, colour, name in marks:
        label = f"{name:<9}{_with_interval(estimate)}"
        axes.plot(
            [k], [estimate["value"]], marker, color=colour, ms=6, clip_on=False, zorder=3,
            label=label,
        )  # fmt: skip
    top = min(1.0, 1.15 * max(np.nanmax(np.append(high, values)), vote["value"], 0.05))
    axes.set_ylim(0, top)
    any_axis(axes, n)
    percent_axis(axes.yaxis)
    axes.legend(
        loc="lower right" if mean["value"] > 0.45 * top else "upper left", frameon=False,
        prop={"family": "DejaVu Sans Mono", "size": 8.5}, handletextpad=0.2, borderaxespad=0.6,
    )  # fmt: skip


def _with_interval(estimate: Mapping[str, Any]) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return _percent(value)
    return f"{_percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def _draw_solve_rate(axes: Axes, results: Mapping[str, Any]) -> None:
    """How many problems are solved never, sometimes, always."""
    from matplotlib.ticker import MaxNLocator

    rates = np.array(results["solve_rate"])
    inner = min(results["n"] - 1, 8)
    edges = np.linspace(0.0, 1.0, inner + 1)
    between = rates[(rates > 0.0) & (rates < 1.0)]
    counts, _ = np.histogram(between, bins=edges)
    width = edges[1] - edges[0]
    never, always = int((rates == 0.0).sum()), int((rates == 1.0).sum())
    places = [-width * 0.75, *(edges[:-1] + width / 2), 1.0 + width * 0.75]
    heights = [never, *counts.tolist(), always]
    colours = [GREY, *[BLUE] * inner, BLUE]
    bars = axes.bar(places, heights, width=width * 0.9, color=colours, lw=0)
    axes.bar_label(bars, [str(h) if h else "" for h in heights], fontsize=8, color=MUTED)
    titled(axes, "How reliably", "problems by their share of correct samples")
    axes.set_xticks([places[0], 0.5, places[-1]], ["never", "sometimes", "always"])
    axes.set_xlabel(f"Var {results['var']['value']:.4f} = mean of p(1-p)")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylim(0, max(heights) * 1.12 + 1)


def _draw_groups(axes: Axes, results: Mapping[str, Any]) -> None:
    """Mean@n of all problems and of every group with its interval, one block per column."""
    whole = results["mean_at_n"]
    lines: list[tuple[str, int | None, Mapping[str, Any] | None]] = [
        ("all problems", results["problems"], whole)
    ]
    for column, groups in results["by"].items():
        lines.append((column, None, None))
        lines += [(str(g["value"]), g["problems"], g["mean_at_n"]) for g in groups]
    columns = " and ".join(results["by"])
    name = f"mean@{results['n']}" if results["n"] > 1 else "accuracy"
    titled(
        axes, f"By {columns}" if columns else "Accuracy", f"{name} with 95 % interval (problems)"
    )
    axes.axvline(whole["value"], color=GREY, lw=1, ls=(0, (4, 3)), zorder=0)
    _bars(axes, lines)


def _bars(axes: Axes, lines: Sequence[tuple[str, int | None, Mapping[str, Any] | None]]) -> None:
    """Horizontal bars with their values in a column at the right; a line without one is a head."""
    places = range(len(lines), 0, -1)
    reach = 0.05
    for place, (_, count, estimate) in zip(places, lines, strict=True):
        if estimate is None:
            continue
        value, low, high = (estimate[key] for key in ("value", "low", "high"))
        axes.barh(place, value, height=0.62, color=BLUE, alpha=0.85, lw=0)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=INK, lw=1.1, solid_capstyle="butt")
        reach = max(reach, value, high or 0.0)
        axes.text(
            1.02, place, f"{_percent(value)}  ({count})", va="center", fontsize=8.5, color=MUTED,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_yticks(list(places), [_shortened(name) for name, _, _ in lines])
    for label, (_, count, _) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_color(INK if count is not None else MUTED)
        label.set_fontstyle("normal" if count is not None else "italic")
    axes.set_ylim(0.3, len(lines) + 0.7)
    axes.set_xlim(0, min(1.0, 1.05 * reach))
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    percent_axis(axes.xaxis)


def _shortened(text: str) -> str:
    return text if len(text) <= _LABEL_CHARS else text[: _LABEL_CHARS - 1] + "…"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
