"""`curves.png`: reward, solo accuracy, consult rate and acceptance over training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_fast.reporting.metrics import Row, read_jsonl
from eapo_fast.reporting.panels import PANELS, Curve, Panel, curves_of, last_step, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#2f6fde", "#8a93a3")

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c9ced6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


def plot_curves(metrics_path: str | Path, png_path: str | Path, *, title: str = "") -> Path:
    """Draw the four panels from a metrics file and return the path of the picture.

    The file may be that of a run still going on. A panel without points says so. Raises
    `DataError` when the metrics file is not JSON lines.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_jsonl(metrics_path)
    target = Path(png_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.05)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 6.4), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, x=0.013, ha="left", fontsize=12.5, fontweight="bold")
        for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            _draw(axes, panel, rows)
        figure.savefig(target)
    return target


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    curves = curves_of(panel, rows)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, color=MUTED, fontsize=8.5)
    axes.set_xlabel("training step")
    axes.set_xlim(0, max(1, last_step(rows)))
    if not curves:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])
        return
    for curve, colour in zip(curves, COLOURS, strict=False):
        _draw_curve(axes, curve, colour)
    _scale(axes, panel, curves)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="best", handlelength=1.8)


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    line = curve.line
    if curve.low:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, lw=0)
    if line.smooth and smoothing_window(len(curve.values)) > 1:
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.28, lw=1)
    axes.plot(
        curve.steps,
        curve.trend,
        color=colour,
        lw=1.4 if line.dashed else 2,
        ls=(0, (4, 3)) if line.dashed else "-",
        marker="o" if line.markers or len(curve.steps) == 1 else None,
        ms=4.5,
        label=line.label or None,
        clip_on=not line.markers,
    )


def _scale(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    top = max(max(curve.high or curve.values) for curve in curves)
    bottom = min(min(curve.low or curve.values) for curve in curves)
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        top = 1.03 if top > 0.5 else max(0.1, top * 1.15)
        axes.set_ylim(0, top)
    elif bottom >= 0:
        axes.set_ylim(0, max(top * 1.08, 0.1))
