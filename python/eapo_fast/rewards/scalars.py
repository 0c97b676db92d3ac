"""Are two expressions the same value? Exact where possible, certain or undecided elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.tree import (
    Call,
    Constant,
    Node,
    Number,
    Percent,
    Product,
    Unreadable,
    symbols,
    walk,
)
from eapo_fast.rewards.values import (
    Gaussian,
    Inexact,
    Point,
    Undefined,
    decimals,
    exact,
    numeric,
    numeric_context,
)

TRIALS = 4
"""Points at which two expressions with variables must agree."""
GUARD_DIGITS = 60
"""Digits of a numeric comparison beyond what its literals need."""


class Outcome(NamedTuple):
    """Equal, different, or (None) not decided, and why."""

    equal: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Arena:
    """What one verdict shares: the key of its random points and its step budget."""

    key: str
    """Text that both answers contribute to, so that nobody can aim at the points."""
    meter: Meter
    """Steps left."""

    def point(self, names: set[str], trial: int) -> dict[str, Fraction]:
        """Return keyed rational values; even trials are positive, odd ones have mixed signs."""
        return {name: self._draw(name, trial) for name in (*names, "\\pi", "\\e")}

    def _draw(self, name: str, trial: int) -> Fraction:
        seed = f"{self.key}\0{name}\0{trial}".encode()
        bits = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        value = Fraction(1 + bits % 0xFFFF_FFFB, 1_000_003) % 4 + Fraction(1, 7)
        return -value if trial % 2 and bits >> 63 else value


def compare_scalars(a: Node, b: Node, arena: Arena) -> Outcome:
    """Compare two expressions.

    Different is certain (exact values, or numeric ones that differ in leading digits). Equal is
    exact for numbers; with variables it is agreement at `TRIALS` keyed points, with roots and
    functions agreement to at least `GUARD_DIGITS` / 2 digits beyond the size of the literals.
    """
    if isinstance(a, Number) and isinstance(b, Number):
        return _verdict(a.value == b.value)
    infinite = _infinity(a), _infinity(b)
    if any(infinite):
        return Outcome(infinite[0] == infinite[1], "infinity")
    outcome = _percent_outcome(a, b, arena)
    if outcome is None:
        outcome = _compare_at_points(a, b, arena)
    if outcome.equal is False and _has_bare_log(a) != _has_bare_log(b):
        return Outcome(None, "a logarithm without a base")
    return outcome


def proportional(a: Node, b: Node, arena: Arena, *, positive: bool = False) -> Outcome:
    """Tell whether `a = c b` for a constant c (above 0 if `positive`), for equations."""
    names = symbols(a) | symbols(b)
    points = [arena.point(names, trial) for trial in range(TRIALS + 1)]
    try:
        lefts = [exact(a, point, arena.meter) for point in points]
        rights = [exact(b, point, arena.meter) for point in points]
    except (Inexact, Undefined):
        return Outcome(None, "an equation with roots or functions")
    if any(not x.re and not x.im for x in lefts + rights) or any(x.im for x in lefts + rights):
        return Outcome(None, "an equation without terms or with i")
    ratios = {left.re / right.re for left, right in zip(lefts, rights, strict=True)}
    if len(ratios) == 1 and (not positive or ratios.pop() > 0):
        return Outcome(True, "proportional equations")
    if _is_affine(a, points, arena) and _is_affine(b, points, arena):
        return Outcome(False, "different linear equations")
    return Outcome(None, "equations of different form")


def _verdict(equal: bool) -> Outcome:
    return Outcome(equal, "equal values" if equal else "different values")


def _percent_outcome(a: Node, b: Node, arena: Arena) -> Outcome | None:
    """Accept a per cent sign that only one side writes, besides the exact meaning."""
    if isinstance(a, Percent) == isinstance(b, Percent):
        return None
    plain = [node.operand if isinstance(node, Percent) else node for node in (a, b)]
    same = _compare_at_points(plain[0], plain[1], arena)
    return Outcome(True, "equal up to the per cent sign") if same.equal else None


def _infinity(node: Node) -> int:
    if node == Constant("inf"):
        return 1
    if isinstance(node, Product) and Constant("inf") in node.factors:
        rest = [factor for factor in node.factors if factor != Constant("inf")]
        if all(isinstance(factor, Number) and factor.value for factor in rest):
            negative = sum(isinstance(f, Number) and f.value < 0 for f in rest) % 2
            return -1 if negative else 1
    return 0


def _has_bare_log(node: Node) -> bool:
    return any(
        isinstance(part, Call) and part.name == "log" and len(part.arguments) == 1
        for part in walk(node)
    )


def _compare_at_points(a: Node, b: Node, arena: Arena) -> Outcome:
    names = symbols(a) | symbols(b)
    if any(part == Constant("inf") for node in (a, b) for part in walk(node)):
        return Outcome(None, "arithmetic with infinity")
    if names and symbols(a) != symbols(b) and not (symbols(a) and symbols(b)):
        return _constant_against_variable(a, b, names, arena)
    return _agree(a, b, names, arena)


def _constant_against_variable(a: Node, b: Node, names: set[str], arena: Arena) -> Outcome:
    outcome = _agree(a, b, names, arena)
    if outcome.equal is False:
        return Outcome(False, "a constant against an expression with variables")
    return outcome


def _agree(a: Node, b: Node, names: set[str], arena: Arena) -> Outcome:
    outcome, defined = Outcome(None, "no value at any point"), 0
    for trial in range(2 * TRIALS):
        point = arena.point(names, trial)
        try:
            outcome, settled = _at_point(a, b, point, arena)
        except Undefined as reason:
            if not names:
                return Outcome(None, f"undefined: {reason}")
            continue
        defined += 1
        if outcome.equal is None:
            return outcome
        if outcome.equal is False:
            if defined > 1 and trial % 2:
                return Outcome(None, "equal for positive variables only")
            return outcome
        if settled or defined == TRIALS:
            return outcome
    return Outcome(None, "undefined at the points tried") if defined < TRIALS else outcome


def _at_point(a: Node, b: Node, point: Point, arena: Arena) -> tuple[Outcome, bool]:
    """Compare at one point; the flag says that no other point can change the outcome."""
    try:
        left, right = exact(a, point, arena.meter), exact(b, point, arena.meter)
    except Inexact:
        settled = not symbols(a) and not symbols(b)
        return _numeric_outcome(a, b, point, arena), settled
    variable = any(
        isinstance(p, Constant) and p.name in ("pi", "e") for n in (a, b) for p in walk(n)
    ) or bool(symbols(a) | symbols(b))
    return _verdict(left == right), not variable


def _numeric_outcome(a: Node, b: Node, point: Point, arena: Arena) -> Outcome:
    extra = sum(len(str(point[name])) for name in symbols(a) | symbols(b))
    digits = GUARD_DIGITS + extra + decimals(a) + decimals(b)
    context = numeric_context(digits)
    try:
        left = numeric(a, point, context, arena.meter)
        right = numeric(b, point, context, arena.meter)
    except (ArithmeticError, ValueError) as reason:
        raise Undefined(str(reason) or type(reason).__name__) from reason
    scale = max(abs(left), abs(right), 1)
    difference = abs(left - right) / scale
    if difference < context.mpf(10) ** (20 - digits):
        return Outcome(True, f"equal to {digits - 20} digits")
    if difference > context.mpf(10) ** (-(digits // 2)):
        return Outcome(False, "different values")
    return Outcome(None, "too close to tell apart")


def _is_affine(node: Node, points: list[dict[str, Fraction]], arena: Arena) -> bool:
    """Test `f(p) + f(q) = 2 f((p + q) / 2)` for two pairs of points."""
    for p, q in pairwise(points[:3]):
        middle = {name: (p[name] + q[name]) / 2 for name in p}
        try:
            ends = exact(node, p, arena.meter), exact(node, q, arena.meter)
            centre = exact(node, middle, arena.meter)
        except (Inexact, Undefined, Unreadable):
            return False
        if _mean(*ends) != centre:
            return False
    return True


def _mean(a: Gaussian, b: Gaussian) -> Gaussian:
    return Gaussian((a.re + b.re) / 2, (a.im + b.im) / 2)
