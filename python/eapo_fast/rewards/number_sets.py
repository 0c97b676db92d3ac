"""Sets of real numbers with rational ends, as intervals in order: so equal sets look equal."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from typing import NamedTuple

from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.tree import (
    INFINITY,
    MINUS_ONE,
    Bracketed,
    Combined,
    Node,
    Product,
    SetOf,
    Union,
    Unreadable,
)
from eapo_fast.rewards.values import Inexact, Undefined, exact


class End(NamedTuple):
    """A cut between numbers: `value`, just below (-1) or just above it (1), or infinity."""

    sign: int
    """-1 and 1 for minus and plus infinity, 0 for a number."""
    value: Fraction
    side: int


Intervals = tuple[tuple[End, End], ...]
"""Disjoint intervals that do not touch, from left to right, each between two cuts."""
_MOST_BITS = 2048
"""Longest end that is compared here: all pairs of ends may meet."""
_LEFT, _RIGHT = End(-1, Fraction(0), 0), End(1, Fraction(0), 0)


def number_set(node: Node, meter: Meter) -> Intervals | None:
    """Return the set as intervals, or None if it is no set of numbers with rational ends."""
    match node:
        case Bracketed("(" | "[" as opening, ")" | "]" as closing, (lower, upper)):
            first = _cut(lower, -1 if opening == "[" else 1, meter)
            last = _cut(upper, 1 if closing == "]" else -1, meter)
            if first is None or last is None:
                return None
            return ((first, last),) if first < last else ()
        case SetOf(items):
            cuts = [(_cut(item, -1, meter), _cut(item, 1, meter)) for item in items]
            pairs = [(a, b) for a, b in cuts if a and b and not a.sign]
            return _joined(pairs) if len(pairs) == len(items) else None
        case Union(parts):
            sets = [number_set(part, meter) for part in parts]
            known = [part for part in sets if part is not None]
            return _joined(sum(known, ())) if len(known) == len(sets) else None
        case Combined(operation, left, right):
            a, b = number_set(left, meter), number_set(right, meter)
            if a is None or b is None:
                return None
            return common(a, _complement(b) if operation == "setminus" else b)
    return None


def common(*sets: Intervals) -> Intervals:
    """Return the numbers that all sets have."""
    return reduce(_meet, sets, ((_LEFT, _RIGHT),))


def _meet(a: Intervals, b: Intervals) -> Intervals:
    pairs = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b]
    return _joined([pair for pair in pairs if pair[0] < pair[1]])


def _complement(intervals: Intervals) -> Intervals:
    cuts = [_LEFT, *(cut for pair in intervals for cut in pair), _RIGHT]
    pairs = zip(cuts[::2], cuts[1::2], strict=True)
    return tuple((a, b) for a, b in pairs if a < b)


def _joined(intervals: Sequence[tuple[End, End]]) -> Intervals:
    result: list[tuple[End, End]] = []
    for first, last in sorted(intervals):
        if result and first <= result[-1][1]:
            result[-1] = result[-1][0], max(last, result[-1][1])
        else:
            result.append((first, last))
    return tuple(result)


def _cut(node: Node, side: int, meter: Meter) -> End | None:
    if node == INFINITY:
        return _RIGHT
    if node == Product((MINUS_ONE, INFINITY)):
        return _LEFT
    try:
        value = exact(node, {}, meter)
    except (Inexact, Undefined, Unreadable, KeyError):
        return None
    if value.im or value.re.numerator.bit_length() + value.re.denominator.bit_length() > _MOST_BITS:
        return None
    return End(0, value.re, side)
