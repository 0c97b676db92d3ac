"""What the curves show, told once for the PNG (`curves.py`) and for the page (`charts.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eapo_fast.reporting.metrics import Row, series
from eapo_fast.reporting.stats import moving_average


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric in a panel."""

    metric: str
    """Name in `metrics.jsonl`."""
    label: str = ""
    """Legend text; empty when the panel has one line only."""
    low: str = ""
    """Metric of the lower end of the interval, if there is one."""
    high: str = ""
    """Metric of the upper end of the interval."""
    smooth: bool = False
    """Draw the values faintly and their moving average on top."""
    dashed: bool = False
    """Draw as a reference line."""
    markers: bool = False
    """Mark every measurement (for rare ones, such as evaluations)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One small chart over training steps."""

    title: str
    """What is shown."""
    unit: str
    """Unit of the vertical axis, with what it is counted over."""
    lines: tuple[Line, ...]
    """The lines, the most important first."""
    share: bool = False
    """Values are proportions, shown in per cent on a fixed 0-100 % axis unless much smaller."""


PANELS: tuple[Panel, ...] = (
    Panel(
        title="Reward",
        unit="mean per rollout",
        lines=(Line(metric="reward", smooth=True),),
    ),
    Panel(
        title="Solo accuracy",
        unit="held-apart problems solved without help, 95 % interval",
        lines=(
            Line(
                metric="eval_solo_accuracy",
                low="eval_solo_accuracy_low",
                high="eval_solo_accuracy_high",
                markers=True,
            ),
        ),
        share=True,
    ),
    Panel(
        title="Consult rate",
        unit="consults asked per rollout",
        lines=(Line(metric="expert/consult_rate", smooth=True),),
    ),
    Panel(
        title="Acceptance",
        unit="share of consults",
        lines=(
            Line(metric="expert/accepted_share", label="accepted", smooth=True),
            Line(metric="expert/acceptance", label="schedule", dashed=True),
        ),
        share=True,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The points of one line, ready to draw."""

    line: Line
    """What was asked for."""
    steps: list[int]
    """Training steps, ascending as logged."""
    values: list[float]
    """Values as logged, one a step."""
    trend: list[float]
    """Moving average of `values` when the line is smoothed, `values` otherwise."""
    low: list[float]
    """Lower ends of the interval, or empty."""
    high: list[float]
    """Upper ends of the interval, or empty."""


def curves_of(panel: Panel, rows: Sequence[Row]) -> list[Curve]:
    """The lines of `panel` that have at least one point in `rows`."""
    found = (_curve(line, rows) for line in panel.lines)
    return [curve for curve in found if curve.steps]


def last_step(rows: Iterable[Row]) -> int:
    """The last step logged, 0 without any."""
    return max((int(row.get("step", 0)) for row in rows), default=0)


def smoothing_window(count: int) -> int:
    """Points averaged for a trend of `count` values: about a twelfth, odd, 1 below a dozen."""
    return count // 12 | 1


def _curve(line: Line, rows: Sequence[Row]) -> Curve:
    steps, values = series(rows, line.metric)
    low, high = series(rows, line.low)[1], series(rows, line.high)[1]
    if len(low) != len(values) or len(high) != len(values):
        low, high = [], []
    window = smoothing_window(len(values)) if line.smooth else 1
    return Curve(
        line=line,
        steps=steps,
        values=values,
        trend=moving_average(values, window),
        low=low,
        high=high,
    )
