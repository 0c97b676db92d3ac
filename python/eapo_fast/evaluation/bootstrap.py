"""Confidence intervals of means over problems, by resampling the problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eapo_fast.reporting.stats import wilson

Array = NDArray[np.float64]
RESAMPLES = 10_000
"""Noise of an end of the interval: about 1.5 % of its width."""
LEVEL = 0.95
_CHUNK = 1 << 22


def resampled_means(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Return means over problems drawn with replacement, [resamples, M].

    Args:
        values: [P] or [P, M]: M quantities of each problem; one draw serves all of them, so
            differences between columns are paired.
        seed: Key of the draws; nothing else but P and `resamples` enters.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    problems, columns = table.shape
    rng = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), problems]))
    means = np.empty((resamples, columns))
    step = max(1, _CHUNK // problems)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(problems, size=(rows, problems))
        drawn += np.arange(rows)[:, None] * problems
        counts = np.bincount(drawn.ravel(), minlength=rows * problems)
        means[start : start + rows] = counts.reshape(rows, problems) @ table
    averages: Array = means / problems
    return averages


def intervals(
    values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Array:
    """Return the interval of the mean of each column, [M, 2]; [1, 2] for values [P].

    Percentile intervals, with the tail share that makes them as wide as Student's for few problems
    (T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, expanded percentile).
    One problem tells nothing of others: NaN.
    """
    problems = np.asarray(values).shape[0]
    if problems < 2:
        columns = 1 if np.ndim(values) == 1 else np.shape(values)[1]
        return np.full((columns, 2), np.nan)
    means = resampled_means(values, seed=seed, resamples=resamples)
    tail = expanded_tail(problems, level)
    ends: Array = np.quantile(means, [tail, 1.0 - tail], axis=0).T
    return ends


def share_interval(values: Sequence[float] | Array, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean of shares in [0, 1].

    The bootstrap's, but Wilson's where all problems have one value: resampling would give it no
    width, as if 10 of 10 proved that the 11th is right.
    """
    column = np.asarray(values, dtype=np.float64)
    if np.ptp(column) == 0.0:
        return wilson(float(column[0]) * len(column), len(column))
    low, high = intervals(column, seed=seed)[0]
    return float(low), float(high)


@lru_cache(maxsize=256)
def expanded_tail(problems: int, level: float = LEVEL) -> float:
    """Return the tail share at which percentiles of the bootstrap have Student's width."""
    quantile = student_quantile(0.5 + level / 2, problems - 1)
    return 0.5 * math.erfc(math.sqrt(problems / (problems - 1)) * quantile / math.sqrt(2.0))


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile (0.5 < probability < 1) of Student's t with whole degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        inside = 0.5 + _central(middle, degrees) / 2 < probability
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central(theta: float, degrees: int) -> float:
    """Return P(|t| < sqrt(degrees) tan(theta)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine * cosine * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
