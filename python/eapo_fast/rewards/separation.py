"""How close to zero an algebraic number may be without being zero.

The bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt (Algorithmica 55, 2009): an expression E
of rationals, `+ - * /` and roots is zero, or `|E| >= 1 / (u^(D-1) l)`, where u and l bound the
conjugates of its numerator and denominator and D is the product of the degrees of its roots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from eapo_fast.rewards.limits import MAX_PRECISION
from eapo_fast.rewards.tree import (
    Call,
    Constant,
    Node,
    Number,
    Numeral,
    Percent,
    Power,
    Product,
    Quantity,
    Quotient,
    Sum,
)

_Bounds = tuple[float, float]
"""Binary logarithms of u and l, at least 0."""


class _NotAlgebraic(Exception):
    pass


def separation_bits(a: Node, b: Node) -> float | None:
    """Return s such that `a != b` implies `|a - b| >= 2^-s`.

    None: an operation has no known bound, or the bound is beyond the largest working precision.
    """
    work = _Work()
    try:
        u, l = _sum(work.bounds(a), work.bounds(b))  # noqa: E741
    except (_NotAlgebraic, OverflowError):
        return None
    bits = (work.degree() - 1) * u + l + 2
    return bits if bits < MAX_PRECISION else None


@dataclass(slots=True)
class _Work:
    roots: dict[tuple[Node, int], None] = field(default_factory=dict)
    """Radicals, one entry for all places where the same one is written."""

    def degree(self) -> float:
        return math.prod(float(degree) for _, degree in self.roots)

    def bounds(self, node: Node) -> _Bounds:
        match node:
            case Number() | Numeral():
                return _log2(node.value.numerator), _log2(node.value.denominator)
            case Constant("i"):
                self.roots[node, 2] = None
                return 0.0, 0.0
            case Sum(terms):
                total = self.bounds(terms[0])
                for term in terms[1:]:
                    total = _sum(total, self.bounds(term))
                return total
            case Product(factors):
                parts = [self.bounds(factor) for factor in factors]
                return sum(u for u, _ in parts), sum(low for _, low in parts)
            case Quotient(top, bottom):
                return _quotient(self.bounds(top), self.bounds(bottom))
            case Percent(operand):
                return _quotient(self.bounds(operand), (_log2(100), 0.0))
            case Quantity(operand, _):
                return self.bounds(operand)
            case Power(base, Number(value)):
                return self._power(base, value)
            case Call("root", (radicand, Number(value))) if value:
                return self._power(radicand, 1 / value)
        raise _NotAlgebraic

    def _power(self, base: Node, exponent: Fraction) -> _Bounds:
        u, low = self.bounds(base)
        degree, times = exponent.denominator, abs(exponent.numerator)
        if degree > 1:
            self.roots[base, degree] = None
            if u >= low:
                u = (u + (degree - 1) * low) / degree
            else:
                low = ((degree - 1) * u + low) / degree
        bounds = u * times, low * times
        return bounds if exponent >= 0 else bounds[::-1]


def _sum(a: _Bounds, b: _Bounds) -> _Bounds:
    return max(a[0] + b[1], a[1] + b[0]) + 1, a[1] + b[1]


def _quotient(a: _Bounds, b: _Bounds) -> _Bounds:
    return a[0] + b[1], a[1] + b[0]


def _log2(value: int) -> float:
    return float(abs(value).bit_length())
