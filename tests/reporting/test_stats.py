from __future__ import annotations

import pytest

from eapo_fast.reporting.stats import clock, compact, moving_average, percent, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        pytest.param(0, 10, 0.0, 0.2775, id="none-of-ten"),
        pytest.param(10, 10, 0.7225, 1.0, id="all-of-ten"),
        pytest.param(81, 263, 0.2553, 0.3662, id="textbook-81-of-263"),
        pytest.param(0, 0, 0.0, 1.0, id="nothing-known"),
        pytest.param(10 + 1e-12, 10, 0.7225, 1.0, id="rounded-up"),
    ],
)
def test_wilson_matches_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(11, 10), (-1, 10), (0, -1)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_moving_average_keeps_constants_and_length():
    assert moving_average([2.0] * 7, 5) == [2.0] * 7
    assert moving_average([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert moving_average([], 3) == []


def test_numbers_are_short():
    assert [clock(0), clock(59.6), clock(3725), clock(None), clock(float("nan"))] == [
        "0:00", "1:00", "1:02:05", "-:--", "-:--",
    ]  # fmt: skip
    assert [compact(0.51), compact(99), compact(3214.0), compact(2e6), compact(None)] == [
        "0.5", "99", "3.2k", "2.0M", "-",
    ]  # fmt: skip
    assert [percent(0.2149), percent(None), percent(1.0, 0)] == ["21.5 %", "-", "100 %"]
