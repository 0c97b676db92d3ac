"""Estimators against exact rationals and brute force; the bootstrap against its promise."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eapo_fast.evaluation.bootstrap import (
    expanded_tail,
    intervals,
    resampled_means,
    share_interval,
    student_quantile,
)
from eapo_fast.evaluation.estimators import (
    any_at_k,
    majority,
    mean_at_n,
    unbiased_variance,
    variance,
)
from eapo_fast.evaluation.voting import answer_classes
from eapo_fast.reporting.stats import wilson

TABLES = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=5)
)


def exact_any_at_k(row: list[int], k: int) -> Fraction:
    """Share of the k-subsets that hold a correct sample, counted one by one."""
    subsets = list(combinations(row, k))
    return Fraction(sum(any(s) for s in subsets), len(subsets))


@given(TABLES)
def test_any_at_k_is_the_share_of_subsets_with_a_correct_sample(table: list[list[int]]) -> None:
    found = any_at_k(table)
    for row, values in zip(table, found, strict=True):
        exact = [float(exact_any_at_k(row, k)) for k in range(1, len(row) + 1)]
        np.testing.assert_allclose(values, exact, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", [32, 1000])
def test_any_at_k_of_many_samples_equals_the_binomial_formula(n: int) -> None:
    for right in (0, 1, n // 3, n - 1, n):
        row = [1] * right + [0] * (n - right)
        exact = [
            float(1 - Fraction(math.comb(n - right, k), math.comb(n, k))) for k in range(1, n + 1)
        ]
        np.testing.assert_allclose(any_at_k([row])[0], exact, rtol=1e-12, atol=1e-15)


@given(TABLES)
def test_relations_between_the_estimates(table: list[list[int]]) -> None:
    curve = any_at_k(table)
    np.testing.assert_allclose(curve[:, 0], mean_at_n(table), atol=1e-15)
    assert (np.diff(curve, axis=1) >= -1e-15).all()
    np.testing.assert_array_equal(curve[:, -1], [float(any(row)) for row in table])
    shuffled = [row[::-1] for row in table]
    np.testing.assert_array_equal(any_at_k(shuffled), curve)
    np.testing.assert_allclose(variance(table), np.var(np.array(table, float), axis=1), atol=1e-15)
    if len(table[0]) > 1:
        expected = np.var(np.array(table, float), axis=1, ddof=1)
        np.testing.assert_allclose(unbiased_variance(table), expected, atol=1e-15)


def test_one_sample_has_no_unbiased_variance() -> None:
    assert np.isnan(unbiased_variance([[1], [0]])).all()


@pytest.mark.parametrize("scores", [[], [[]], [1, 0], [[0.5]], [[2]]])
def test_other_shapes_and_values_are_refused(scores: list[object]) -> None:
    with pytest.raises(ValueError, match="scores"):
        mean_at_n(scores)


def test_any_at_k_is_unbiased() -> None:
    """Over all 2^6 outcomes of 6 samples with p = 0.3 its mean is 1 - 0.7^k."""
    p, n = 0.3, 6
    outcomes = [[(i >> j) & 1 for j in range(n)] for i in range(2**n)]
    chance = [p ** sum(o) * (1 - p) ** (n - sum(o)) for o in outcomes]
    expected = [1 - (1 - p) ** k for k in range(1, n + 1)]
    np.testing.assert_allclose(chance @ any_at_k(outcomes), expected, rtol=1e-12)
    np.testing.assert_allclose(chance @ unbiased_variance(outcomes), p * (1 - p), rtol=1e-12)


@pytest.mark.parametrize(
    ("classes", "correct", "expected"),
    [
        ([0, 0, 2], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1, 1, 0], [True, False, False, True], 0.5),
        ([0, 1, 2], [True, False, False], 1 / 3),
        ([None, None], [False, False], 0.0),
        ([None, None, 2], [False, False, True], 1.0),
        ([0, 0], [True, False], 0.5),
    ],
    ids=["right", "wrong", "tie", "three-way tie", "no votes", "abstentions", "mixed class"],
)
def test_majority(classes: list[int | None], correct: list[bool], expected: float) -> None:
    assert majority(classes, correct) == pytest.approx(expected)


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.booleans()), max_size=9))
def test_majority_does_not_depend_on_the_order(votes: list[tuple[int | None, bool]]) -> None:
    def outcome(order: list[tuple[int | None, bool]]) -> float:
        return majority([c for c, _ in order], [r for _, r in order])

    assert outcome(votes) == pytest.approx(outcome(votes[::-1]))
    assert 0.0 <= outcome(votes) <= 1.0


def test_equal_answers_vote_together() -> None:
    answers = ["1/2", "0.5", "3", "\\frac{1}{2}", None, "3.0", "x+1", "1+x", "3"]
    assert answer_classes(answers) == [0, 0, 2, 0, None, 2, 6, 6, 2]
    assert answer_classes(["}{", "}{", "\\frac"]) == [0, 0, 2]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047364), (2, 4.3026527297), (3, 3.1824463053), (5, 2.5705818366),
     (10, 2.2281388520), (30, 2.0422724563), (100, 1.9839715185)],
)  # fmt: skip
def test_student_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-7)


@pytest.mark.parametrize("degrees", [1, 2, 7, 8, 299, 1318])
def test_student_quantiles_invert_the_distribution(degrees: int) -> None:
    """P(t < q) = 1 - I_{v/(v+q^2)}(v/2, 1/2) / 2, by mpmath's incomplete beta function."""
    from mpmath import betainc

    quantile = student_quantile(0.975, degrees)
    inside = betainc(degrees / 2, 0.5, 0, degrees / (degrees + quantile**2), regularized=True)
    assert float(1 - inside / 2) == pytest.approx(0.975, abs=1e-12)


def test_expanded_tails_come_from_student_and_end_at_the_plain_ones() -> None:
    assert expanded_tail(10) < expanded_tail(100) < 0.025
    assert expanded_tail(100_000) == pytest.approx(0.025, rel=1e-3)


def test_resampled_means_are_those_of_counted_draws() -> None:
    """The same draws, problem by problem."""
    values = np.arange(12.0).reshape(4, 3)
    rng = np.random.Generator(np.random.Philox(key=[7, 4]))
    drawn = rng.integers(4, size=(50, 4))
    expected = [np.mean([values[i] for i in row], axis=0) for row in drawn]
    np.testing.assert_allclose(resampled_means(values, seed=7, resamples=50), expected)


def test_intervals_are_a_function_of_values_and_seed() -> None:
    values = np.random.default_rng(0).random((40, 3))
    np.testing.assert_array_equal(intervals(values, seed=3), intervals(values, seed=3))
    np.testing.assert_allclose(intervals(values)[1], intervals(values[:, 1])[0], rtol=1e-14)
    assert not np.array_equal(intervals(values, seed=3), intervals(values, seed=4))
    low, high = intervals(values).T
    assert (low < values.mean(axis=0)).all()
    assert (values.mean(axis=0) < high).all()


def test_one_problem_has_no_interval_and_equal_problems_have_wilsons() -> None:
    assert np.isnan(intervals(np.ones((1, 2)))).all()
    assert share_interval([1.0] * 10) == wilson(10, 10)
    assert share_interval([0.25] * 8) == wilson(2, 8)


@pytest.mark.parametrize(("problems", "samples"), [(12, 8), (30, 32), (200, 4)])
def test_the_interval_covers_the_true_mean_in_95_of_100_cases(problems: int, samples: int) -> None:
    """Problems of Beta-distributed difficulty, whose mean share is known."""
    rng = np.random.default_rng([problems, samples])
    a, b, runs = 0.6, 0.9, 600
    truth, covered = a / (a + b), 0
    for run in range(runs):
        p = rng.beta(a, b, size=(problems, 1))
        shares = (rng.random((problems, samples)) < p).mean(axis=1)
        low, high = intervals(shares, seed=run, resamples=1000)[0]
        covered += bool(low <= truth <= high)
    assert 0.92 <= covered / runs <= 0.98
