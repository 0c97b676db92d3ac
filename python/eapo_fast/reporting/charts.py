"""The panels of `panels.py` as inline SVG whose colours come from the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

from eapo_fast.reporting.metrics import Row
from eapo_fast.reporting.panels import (
    PANELS,
    Curve,
    Panel,
    curves_of,
    last_step,
    smoothing_window,
)

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 30


def render_charts(rows: Sequence[Row]) -> str:
    """One `<figure>` a panel; panels without points are left out."""
    return "\n".join(_figure(panel, rows) for panel in PANELS if curves_of(panel, rows))


class Scale:
    """Data to picture coordinates of one panel."""

    def __init__(self, panel: Panel, curves: Sequence[Curve], steps: int) -> None:
        self.steps = max(1, steps)
        top = max(max(curve.high or curve.values) for curve in curves)
        bottom = min(min(curve.low or curve.values) for curve in curves)
        if panel.share:
            self.bottom, self.top = 0.0, 1.03 if top > 0.5 else max(0.1, top * 1.15)
        else:
            self.bottom = 0.0 if bottom >= 0 else bottom
            self.top = max(top * 1.08, self.bottom + 0.1)

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    unit = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    if whole:
        unit = max(1, math.ceil(unit))
    first = math.ceil(low / unit - 1e-9)
    return [i * unit for i in range(first, math.floor(high / unit + 1e-9) + 1)]


def _figure(panel: Panel, rows: Sequence[Row]) -> str:
    curves = curves_of(panel, rows)
    scale = Scale(panel, curves, last_step(rows))
    body = [*_axes(panel, scale)]
    for index, curve in enumerate(curves):
        body += _curve(curve, scale, f"c{index}")
    data = escape(json.dumps(_hover_data(panel, curves, scale)), quote=True)
    return (
        f'<figure class="chart"><figcaption><b>{escape(panel.title)}</b>'
        f"<span>{escape(panel.unit)}</span>{_legend(curves)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}" '
        f'data-chart="{data}">{"".join(body)}</svg></figure>'
    )


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    keys = (f'<i class="key c{i}">{escape(c.line.label)}</i>' for i, c in enumerate(curves))
    return f"<em>{''.join(keys)}</em>"


def _axes(panel: Panel, scale: Scale) -> list[str]:
    out = []
    for value in ticks(scale.bottom, scale.top):
        y = scale.y(value)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(
            f'<text class="ty" x="{LEFT - 7}" y="{y + 3.5:.1f}">{_label(panel, value)}</text>'
        )
    for step in ticks(0, scale.steps, 6, whole=True):
        x, y = scale.x(step), HEIGHT - BOTTOM
        out.append(f'<text class="tx" x="{x:.1f}" y="{y + 16}">{step:.0f}</text>')
    out.append(f'<text class="tx unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}">training step</text>')
    return out


def _curve(curve: Curve, scale: Scale, name: str) -> list[str]:
    out = []
    if curve.low:
        outline = [*zip(curve.steps, curve.high, strict=True)]
        outline += reversed([*zip(curve.steps, curve.low, strict=True)])
        out.append(f'<path class="band {name}" d="{_path(outline, scale)}Z"/>')
    if curve.line.smooth and smoothing_window(len(curve.values)) > 1:
        raw = _path([*zip(curve.steps, curve.values, strict=True)], scale)
        out.append(f'<path class="raw {name}" d="{raw}"/>')
    style = "ref" if curve.line.dashed else "line"
    trend = _path([*zip(curve.steps, curve.trend, strict=True)], scale)
    out.append(f'<path class="{style} {name}" d="{trend}"/>')
    if curve.line.markers or len(curve.steps) == 1:
        out += (
            f'<circle class="dot {name}" cx="{scale.x(s):.1f}" cy="{scale.y(v):.1f}" r="3.2"/>'
            for s, v in zip(curve.steps, curve.trend, strict=True)
        )
    return out


def _path(points: Sequence[tuple[float, float]], scale: Scale) -> str:
    return "M" + "L".join(f"{scale.x(s):.1f} {scale.y(v):.1f}" for s, v in points)


def _label(panel: Panel, value: float) -> str:
    return f"{100 * value:.3g}&#8239;%" if panel.share else f"{value:.3g}"


def _hover_data(panel: Panel, curves: Sequence[Curve], scale: Scale) -> dict[str, object]:
    """What the page's script needs to show the values under the pointer."""
    return {
        "share": panel.share,
        "x": [LEFT, WIDTH - RIGHT, scale.steps],
        "y": [TOP, HEIGHT - BOTTOM],
        "lines": [
            {
                "name": curve.line.label,
                "steps": curve.steps,
                "values": [round(value, 5) for value in curve.values],
                "low": [round(value, 5) for value in curve.low],
                "high": [round(value, 5) for value in curve.high],
            }
            for curve in curves
        ],
    }
