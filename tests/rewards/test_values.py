from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from eapo_fast.rewards import verify
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.tree import Node
from eapo_fast.rewards.values import exact

small = st.integers(-50, 50)


def value(text: str) -> Fraction:
    node: Node = parse(text)
    return exact(node, {}, Meter()).re


@given(small, small, st.integers(1, 30), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_arithmetic_agrees_with_fractions(a: int, b: int, c: int, n: int) -> None:
    assert value(f"{a}+{b}\\cdot{c}-({a})^{{{n}}}/{c}") == a + b * c - Fraction(a**n, c)
    assert value(f"-\\frac{{{a}}}{{{c}}}+({b})") == -Fraction(a, c) + b


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=500))
@settings(max_examples=60, deadline=None)
def test_a_fraction_is_itself_however_it_is_written(x: Fraction) -> None:
    top, bottom = x.numerator, x.denominator
    assert verify(f"\\frac{{{top}}}{{{bottom}}}", f"{2 * top}/{2 * bottom}").correct
    other = x + Fraction(1, 10**40)
    assert not verify(str(x), f"{other.numerator}/{other.denominator}").correct


@given(small, small, small)
@settings(max_examples=60, deadline=None)
def test_expanded_polynomials_are_equal_and_changed_ones_are_not(a: int, b: int, c: int) -> None:
    product = f"(x+({a}))(x+({b}))"
    expanded = f"x^2+({a + b})x+({a * b})"
    assert verify(product, expanded, extract="none").correct
    changed = f"{expanded}+({c})"
    status = verify(product, changed, extract="none").status
    assert status == ("incorrect" if c else "correct")


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_products_of_roots(a: int, b: int) -> None:
    assert verify(f"\\sqrt{{{a}}}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}", extract="none").correct
    assert not verify(f"\\sqrt{{{a}}}", f"\\sqrt{{{a + 1}}}", extract="none").correct
