"""Are two expressions the same value? Certain, or undecided with a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from eapo_fast.rewards import balls
from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.modular import Field, draw_field
from eapo_fast.rewards.separation import separation_bits
from eapo_fast.rewards.tree import (
    COLLECTIONS,
    Call,
    Constant,
    Node,
    Number,
    Operator,
    Percent,
    Product,
    Unreadable,
    symbols,
    walk,
)
from eapo_fast.rewards.values import Gaussian, Inexact, NoMethod, TooLarge, Undefined, exact

TRIALS = 4
"""Points at which two expressions with roots or functions of variables must agree."""
_WHOLE_NAMES = frozenset("kmn")
"""Variables that stand for whole numbers where that makes a difference."""


class Outcome(NamedTuple):
    """Equal, different, or (None) not decided, and why."""

    equal: bool | None
    reason: str
    open: bool = False
    """Not decided for want of a method, so computer algebra may decide it."""


@dataclass
class Arena:
    """What one verdict shares: the key of its random draws, its budget, its last resort."""

    key: str
    """Text that both answers contribute to, so that nobody can aim at the draws."""
    meter: Meter = field(default_factory=Meter)
    """Steps left."""
    symbolic: Callable[[Node, Node, Arena], Outcome] | None = None
    """Computer algebra, in the processes that have it."""
    open: bool = False
    """Whether computer algebra was missed."""

    def further(self, a: Node, b: Node, outcome: Outcome) -> Outcome:
        """Return what computer algebra says of an open outcome, or note that it is missed."""
        if self.symbolic is not None:
            return self.symbolic(a, b, self)
        self.open = True
        return outcome

    @cached_property
    def field(self) -> Field:
        """The prime field of this verdict."""
        return draw_field(self.key)

    def point(self, names: Iterable[str], trial: int) -> dict[str, Fraction]:
        """Return keyed rational values; even trials are positive, odd ones have mixed signs."""
        return {name: self._draw(name, trial) for name in names}

    def whole_point(self, names: Iterable[str], trial: int) -> dict[str, Fraction]:
        """Return the same with values from 1 to 60 for the names of whole numbers."""
        point = self.point(names, 2 * trial)
        for name in _WHOLE_NAMES & point.keys():
            point[name] = Fraction(1 + self._bits(name, trial) % 60)
        return point

    def _draw(self, name: str, trial: int) -> Fraction:
        bits = self._bits(name, trial)
        value = Fraction(1 + bits % 0xFFFF_FFFB, 1_000_003) % 4 + Fraction(1, 7)
        return -value if trial % 2 and bits >> 63 else value

    def _bits(self, name: str, trial: int) -> int:
        seed = f"{self.key}\0{name}\0{trial}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")


def compare_scalars(a: Node, b: Node, arena: Arena) -> Outcome:
    """Compare two expressions.

    Different is certain. Equal is certain for rational and algebraic numbers and (but for a chance
    below 2^-60) for rational functions; it is agreement to at least 200 bits beyond literals and
    magnitudes for other constants, and the same at `TRIALS` keyed points for other functions.
    """
    if isinstance(a, Number) and isinstance(b, Number):
        return _verdict(a.value == b.value)
    infinite = _infinity(a), _infinity(b)
    if any(infinite):
        return Outcome(infinite[0] == infinite[1], "infinity")
    parts = [part for node in (a, b) for part in walk(node)]
    if any(isinstance(part, (Operator, *COLLECTIONS)) for part in parts):
        return Outcome(None, "this needs computer algebra", open=True)
    if Constant("inf") in parts:
        return Outcome(None, "arithmetic with infinity")
    try:
        outcome = _percent_outcome(a, b, arena) or _agree(a, b, arena)
    except NoMethod as reason:
        return Outcome(None, str(reason), open=True)
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
        return Outcome(None, "an equation with roots or functions", open=True)
    if any(not x.re and not x.im for x in lefts + rights) or any(x.im for x in lefts + rights):
        return Outcome(None, "an equation without terms or with i", open=True)
    ratios = {left.re / right.re for left, right in zip(lefts, rights, strict=True)}
    if len(ratios) == 1 and (not positive or ratios.pop() > 0):
        return Outcome(True, "proportional equations")
    if _is_affine(a, points, arena) and _is_affine(b, points, arena):
        return Outcome(False, "different linear equations")
    return Outcome(None, "equations of different form", open=True)


def _verdict(equal: bool) -> Outcome:
    return Outcome(equal, "equal values" if equal else "different values")


def _percent_outcome(a: Node, b: Node, arena: Arena) -> Outcome | None:
    """Accept a per cent sign that only one side writes, besides the exact meaning."""
    if isinstance(a, Percent) == isinstance(b, Percent):
        return None
    plain = [node.operand if isinstance(node, Percent) else node for node in (a, b)]
    same = _agree(plain[0], plain[1], arena)
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


def _agree(a: Node, b: Node, arena: Arena) -> Outcome:
    names = symbols(a) | symbols(b)
    if not names:
        return _agree_as_constants(a, b, arena)
    if not balls.apart(a, b, arena.point(names, 0), arena.meter):
        try:
            if _is_identity(a, b, arena):
                return Outcome(True, "the same rational function")
        except Undefined as reason:
            return Outcome(None, f"undefined: {reason}")
    outcome = _agree_at_points(a, b, names, arena)
    if not outcome.equal and names & _WHOLE_NAMES and _agree_for_whole(a, b, names, arena):
        return Outcome(True, "equal for whole numbers")
    if outcome.equal is False and not (symbols(a) and symbols(b)):
        return Outcome(False, "a constant against an expression with variables")
    return outcome


def _agree_as_constants(a: Node, b: Node, arena: Arena) -> Outcome:
    too_large: TooLarge | None = None
    try:
        return _verdict(exact(a, {}, arena.meter) == exact(b, {}, arena.meter))
    except Undefined as reason:
        return Outcome(None, f"undefined: {reason}")
    except Inexact:
        pass
    except TooLarge as reason:
        too_large = reason
    try:
        if balls.apart(a, b, {}, arena.meter):
            return _verdict(False)
        if _is_identity(a, b, arena):
            return Outcome(True, "equal values")
        bits = balls.settle(a, b, {}, arena.meter, separation_bits(a, b))
    except Undefined as reason:
        return Outcome(None, str(too_large) if too_large else f"undefined: {reason}")
    if bits is None:
        return Outcome(None, str(too_large or "too close to tell apart"), open=too_large is None)
    return _verdict(False) if bits < 0 else Outcome(True, f"equal to {bits} bits")


def _is_identity(a: Node, b: Node, arena: Arena) -> bool | None:
    """Tell whether two rational functions are the same; None if one is none."""
    try:
        left, right = (arena.field.residue(node, arena.meter)[0] for node in (a, b))
    except Inexact:
        return None
    return left == right


def _agree_at_points(a: Node, b: Node, names: set[str], arena: Arena) -> Outcome:
    fewest, defined = None, 0
    for trial in range(2 * TRIALS):
        try:
            bits = balls.settle(a, b, arena.point(names, trial), arena.meter, None)
        except Undefined:
            continue
        if bits is None:
            return Outcome(None, "too close to tell apart", open=True)
        if bits < 0:
            if defined and trial % 2:
                return Outcome(None, "equal for positive variables only")
            return _verdict(False)
        defined += 1
        fewest = bits if fewest is None else min(fewest, bits)
        if defined == TRIALS:
            return Outcome(True, f"equal at {TRIALS} points to {fewest} bits")
    return Outcome(None, "undefined at the points tried", open=True)


def _agree_for_whole(a: Node, b: Node, names: set[str], arena: Arena) -> bool:
    for trial in range(TRIALS):
        try:
            bits = balls.settle(a, b, arena.whole_point(names, trial), arena.meter, None)
        except Undefined:
            return False
        if bits is None or bits < 0:
            return False
    return True


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
