"""Estimators over n samples of each of P problems, in float64.

`scores` is always `[P, n]` with 1 for a correct sample and 0 for any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def mean_at_n(scores: ArrayLike) -> Array:
    """Return each problem's share of correct samples, [P]: the paper's "Pass@32" is their mean."""
    shares: Array = _checked(scores).mean(axis=1)
    return shares


def any_at_k(scores: ArrayLike) -> Array:
    """Return the unbiased estimate of pass@k for every k from 1 to n, [P, n].

    pass@k = 1 - C(n-c, k) / C(n, k) with c correct of n samples (Chen et al. 2021, arXiv
    2107.03374), here as a running product of factors in [0, 1], so nothing overflows. Column
    k-1 belongs to k; the last is the plain any-of-n.
    """
    table = _checked(scores)
    n = table.shape[1]
    wrong = n - table.sum(axis=1, keepdims=True)
    drawn = np.arange(n, dtype=np.float64)
    factors = np.clip((wrong - drawn) / (n - drawn), 0.0, 1.0)
    miss: Array = np.cumprod(factors, axis=1)
    return 1.0 - miss


def variance(scores: ArrayLike) -> Array:
    """Return p(1-p) of each problem with p its share of correct samples, [P].

    The mean over problems is what the paper most probably reports as Var: the variance of the n
    0/1 scores as they are, at most 0.25. As an estimate of the policy's own variance it is low by
    the factor (n-1)/n; `unbiased_variance` is not.
    """
    share = mean_at_n(scores)
    return share * (1.0 - share)


def unbiased_variance(scores: ArrayLike) -> Array:
    """Return the unbiased variance of each problem's 0/1 scores, [P]; NaN for one sample."""
    n = _checked(scores).shape[1]
    return variance(scores) * (n / (n - 1) if n > 1 else np.nan)


def majority(classes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Return the probability that a vote over the samples of one problem is right.

    Args:
        classes: Class of equal answers of each sample; None does not vote.
        correct: Whether each sample is correct.

    Equal top classes are drawn from with equal chances. Samples of one class can differ in
    `correct` when a check of one of them came out undecided: the class then counts by its share.
    """
    votes: dict[int, list[bool]] = {}
    for name, right in zip(classes, correct, strict=True):
        if name is not None:
            votes.setdefault(name, []).append(right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    top = [sum(v) / most for v in votes.values() if len(v) == most]
    return sum(top) / len(top)


def _checked(scores: ArrayLike) -> Array:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"scores: got shape {table.shape}, allowed is [problems, samples]")
    if not np.isin(table, (0.0, 1.0)).all():
        raise ValueError("scores: allowed values are 0 and 1")
    return table
