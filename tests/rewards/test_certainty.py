"""What makes a verdict certain: balls, separation bounds and residues."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from eapo_fast.rewards.balls import settle
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.modular import draw_field
from eapo_fast.rewards.separation import separation_bits
from eapo_fast.rewards.symbolic.build import Builder
from eapo_fast.rewards.tree import Node
from eapo_fast.rewards.values import Inexact, Undefined

small = st.integers(1, 40)


def radicals() -> st.SearchStrategy[str]:
    atoms = small.map(str)

    def grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pair = st.tuples(parts, parts)
        return st.one_of(
            pair.map(lambda p: f"({p[0]}+{p[1]})"),
            pair.map(lambda p: f"({p[0]}-{p[1]})"),
            pair.map(lambda p: f"{p[0]}\\cdot {p[1]}"),
            pair.map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
            parts.map(lambda p: f"\\sqrt{{{p}}}"),
            parts.map(lambda p: f"\\sqrt[3]{{{p}}}"),
        )

    return st.recursive(atoms, grown, max_leaves=5)


@given(radicals(), radicals())
@settings(max_examples=120, deadline=None)
def test_a_difference_of_radicals_obeys_its_bound(a: str, b: str) -> None:
    left, right = parse(a), parse(b)
    bound = separation_bits(left, right)
    if bound is None:
        return
    try:
        outcome = settle(left, right, {}, Meter(10**6), bound)
    except Undefined:
        return
    build = Builder(left, right).build
    distance = abs((build(left) - build(right)).evalf(60))
    if not distance.is_finite:
        return
    if outcome == -1:
        assert distance > sympy.Float(2) ** -(bound + 1)
    elif outcome is not None:
        assert distance < 1e-30


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (r"\sqrt2", "1.414213562373095048801688724209698"),
        (r"\sqrt5+\sqrt7", r"\sqrt{24}+0.0000001"),
    ],
)
def test_near_values_are_apart(text: str, other: str) -> None:
    assert settle(parse(text), parse(other), {}, Meter(), None) == -1


def test_points_and_their_absence() -> None:
    power = parse("2^{x}")
    assert settle(power, parse("8"), {"x": Fraction(3)}, Meter(), None) == 8192
    with pytest.raises(Undefined):
        settle(parse(r"\ln(x-3)"), parse("1"), {"x": Fraction(3)}, Meter(), None)
    assert separation_bits(parse(r"\pi"), parse("3")) is None


def same(a: Node, b: Node, key: str) -> bool:
    field = draw_field(key)
    return field.residue(a, Meter())[0] == field.residue(b, Meter())[0]


@given(st.text(max_size=20), small, small, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_residues_know_identities(key: str, a: int, b: int, n: int) -> None:
    left = parse(f"(x+{a})^{n}(y-{b})")
    assert same(left, parse(f"(y-{b})(x+{a})^{n}"), key)
    assert not same(left, parse(f"(y-{b})(x+{a})^{n}+1"), key)
    assert same(parse("i^2+\\frac{\\pi}{\\pi}"), parse("0"), key)


def test_a_field_is_drawn_from_the_key_alone() -> None:
    field = draw_field("some answers")
    assert field == draw_field("some answers")
    assert field.prime != draw_field("other answers").prime
    assert field.prime.bit_length() == 127
    assert sympy.isprime(field.prime)
    assert pow(field.root_of_minus_one, 2, field.prime) == field.prime - 1
    with pytest.raises(Inexact):
        field.residue(parse(r"\sqrt{x}"), Meter())
    with pytest.raises(Inexact):
        field.residue(parse("((x^{999999})^{999999})^{999999}"), Meter())
    with pytest.raises(Undefined):
        field.residue(parse(r"\frac{1}{x-x}"), Meter())
