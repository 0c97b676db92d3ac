"""Interval of a measured proportion and the little number formatting that every surface shares."""

from __future__ import annotations

import math

NORMAL_95 = 1.959963984540054
"""Quantile of the standard normal distribution for a two-sided 95 % interval."""


def wilson(successes: float, n: int, *, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson score interval `(low, high)` of a proportion (E. B. Wilson, 1927).

    It stays inside [0, 1] and is honest at 0 and at n successes, where the textbook interval has
    width zero. `n = 0` knows nothing and gives `(0.0, 1.0)`. `successes` may be a fraction (a
    mean over samples times n). Raises `ValueError` unless `0 <= successes <= n` up to rounding.
    """
    slack = 1e-9 * max(1, n)
    if n < 0 or not -slack <= successes <= n + slack:
        raise ValueError(f"wilson needs 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    share, spread = min(1.0, max(0.0, successes / n)), z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return low, high


def moving_average(values: list[float], window: int) -> list[float]:
    """Centred mean over `window` neighbours, shrinking at both ends; same length as `values`."""
    half = max(0, window // 2)
    out = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        out.append(sum(part) / len(part))
    return out


def percent(value: float | None, digits: int = 1) -> str:
    """`0.215` -> `"21.5 %"`; `None` -> `"-"`."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def compact(value: float | None) -> str:
    """`3214.0` -> `"3.2k"`, for rates whose third digit nobody reads; `None` -> `"-"`."""
    if value is None:
        return "-"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{letter}"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"


def clock(seconds: float | None) -> str:
    """Seconds as `m:ss` or `h:mm:ss`; `None` -> `"-:--"`."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
