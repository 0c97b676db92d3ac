"""Certified values: balls that are proven to hold the exact value (Arb, through python-flint).

Two balls that do not meet prove a difference. Balls that still meet at a precision beyond the
separation bound of a difference of algebraic numbers prove equality.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from eapo_fast.rewards.limits import MAX_PRECISION, Meter
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
    Symbol,
    Unreadable,
)
from eapo_fast.rewards.values import Inexact, NoMethod, Undefined, exact, literal_bits

_PRECISIONS = (128, 512, 2048, MAX_PRECISION)
_GUARD_BITS = 200
"""Bits of agreement, beyond literals and magnitudes, where no separation bound is known."""
_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_PLAIN = _TRIGONOMETRIC | {"sqrt", "exp", "sinh", "cosh", "tanh"}
_ACB_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}
_LARGEST_FACTORIAL = 10**18

_lock = threading.Lock()
"""Arb's working precision belongs to the process, so one thread at a time computes."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def settle(
    a: Node, b: Node, point: Mapping[str, Fraction], meter: Meter, bound: float | None
) -> int | None:
    """Compare two expressions at one point by balls of growing precision.

    Args:
        a: One expression.
        b: The other.
        point: Values of the variables.
        meter: Budget of the verdict.
        bound: Separation bound of `a - b` in bits (`separation.separation_bits`), None if unknown.

    Returns:
        -1: certainly different. A positive number: equal to so many bits, which is a proof when
        `bound` is given. None: the balls meet, but not closely enough to say more.

    Raises:
        Undefined: No value at this point.
        Unreadable: The work exceeds the meter, or a node has no value.
    """
    import flint

    literals = literal_bits(a) + literal_bits(b)
    undefined: Undefined | None = None
    for precision in _PRECISIONS:
        with _lock, flint.ctx.workprec(precision):
            balls = _Balls(flint, point, meter, precision)
            try:
                difference = balls.value(a) - balls.value(b)
            except Undefined as reason:
                undefined = reason
                continue
            if not difference.contains(0):
                return -1
            agreed = -_exponent(difference.abs_upper(), zero=-MAX_PRECISION)
        undefined = None
        needed = _GUARD_BITS + 4 * balls.spread + literals if bound is None else bound
        if agreed > needed:
            return int(agreed)
    if undefined is not None:
        raise undefined
    return None


def apart(a: Node, b: Node, point: Mapping[str, Fraction], meter: Meter) -> bool:
    """Tell, at little cost, whether two expressions certainly differ at a point."""
    import flint

    with _lock, flint.ctx.workprec(_PRECISIONS[0]):
        balls = _Balls(flint, point, meter, _PRECISIONS[0])
        try:
            return not (balls.value(a) - balls.value(b)).contains(0)
        except Undefined:
            return False


def _exponent(magnitude: Any, *, zero: int) -> int:
    """Return e with `2^(e-1) <= magnitude < 2^e` for an exact non-negative number."""
    mantissa, exponent = magnitude.man_exp()
    return int(mantissa).bit_length() + int(exponent) if mantissa else zero


class _Balls:
    """Evaluates trees at one point and precision; call with the lock held."""

    def __init__(
        self, flint: Any, point: Mapping[str, Fraction], meter: Meter, precision: int
    ) -> None:
        self.flint = flint
        self.point = point
        self.meter = meter
        self.cost = 1 + precision // 128
        self.spread = 0
        """Largest binary exponent, up or down, of a value on the way."""

    def value(self, node: Node) -> Any:
        """Return an `acb` that holds the node's value."""
        self.meter.spend(self.cost)
        ball = self._value(node)
        if not ball.is_finite():
            raise Undefined("not finite")
        upper = _exponent(ball.abs_upper().mid(), zero=0)
        lower = _exponent(ball.abs_lower().mid(), zero=0)
        self.spread = max(self.spread, abs(upper), abs(lower))
        return ball

    def _value(self, node: Node) -> Any:
        match node:
            case Number() | Numeral():
                return self._rational(node.value)
            case Symbol(name):
                return self._rational(self.point[name])
            case Constant("i"):
                return self.flint.acb(0, 1)
            case Constant("pi"):
                return self.flint.acb.pi()
            case Constant("e"):
                return self.flint.acb(1).exp()
            case Quantity(operand, _):
                return self.value(operand)
            case Percent(operand):
                return self.value(operand) / 100
            case Sum(terms):
                return sum(map(self.value, terms), self.flint.acb(0))
            case Product(factors):
                return math.prod(map(self.value, factors), start=self.flint.acb(1))
            case Quotient(top, bottom):
                below = self.value(bottom)
                if below.is_zero():
                    raise Undefined("division by zero")
                return self.value(top) / below
            case Power(base, exponent):
                return self._power(self.value(base), exponent)
            case Call(name, arguments):
                return self._call(name, arguments)
        raise Unreadable(f"{type(node).__name__} has no value")

    def _rational(self, value: Fraction) -> Any:
        return self.flint.acb(self.flint.fmpq(value.numerator, value.denominator))

    def _exactly(self, node: Node) -> Fraction | None:
        """Return the node's value if it is rational and small enough to be exact."""
        try:
            value = exact(node, self.point, self.meter)
        except (Inexact, Undefined, KeyError):  # KeyError: pi or e, which have no exact value
            return None
        return None if value.im else value.re

    def _power(self, base: Any, exponent: Node) -> Any:
        power = self._exactly(exponent)
        if base.is_zero():
            if power is None or power <= 0:
                raise Undefined("a power of zero")
            return base
        if power is None:
            return base.pow(self.value(exponent))
        if power.denominator == 1:
            return base**power.numerator
        if power.denominator == 2:
            return base.sqrt() ** power.numerator
        if power.denominator % 2 and _is_negative(base):  # the real odd root
            value = (-base).pow(self._rational(power))
            return -value if power.numerator % 2 else value
        return base.pow(self._rational(power))

    def _call(self, name: str, arguments: tuple[Node, ...]) -> Any:
        if name == "root":
            return self._root(self.value(arguments[0]), self._exactly(arguments[1]))
        if name in ("log", "lg"):
            return self._logarithm(name, arguments)
        if name == "factorial":
            return self._factorial(self._exactly(arguments[0]))
        if name in ("max", "min"):
            return self._extreme(name, arguments)
        value = self.value(arguments[0])
        if name in _TRIGONOMETRIC and _in_degrees(arguments[0]):
            value = value * self.flint.acb.pi() / 180
        if name == "conj":
            return self.flint.acb(value.real, -value.imag)
        if name == "abs":
            return self.flint.acb(abs(value))
        if name in ("floor", "ceil") and value.imag.is_zero():
            return self.flint.acb(getattr(value.real, name)())
        if name in _PLAIN or name in _ACB_NAMES:
            return getattr(value, _ACB_NAMES.get(name, name))()
        raise NoMethod(f"{name} of this has no value")

    def _root(self, radicand: Any, degree: Fraction | None) -> Any:
        if degree is None or degree == 0:
            raise Unreadable("a root of a degree that is no rational number")
        return self._power(radicand, Number(1 / degree))

    def _logarithm(self, name: str, arguments: tuple[Node, ...]) -> Any:
        value = self.value(arguments[0]).log()
        if name == "lg":
            return value / self.flint.acb(10).log()
        return value / self.value(arguments[1]).log() if len(arguments) > 1 else value

    def _factorial(self, argument: Fraction | None) -> Any:
        if argument is None or argument.denominator != 1 or not 0 <= argument <= _LARGEST_FACTORIAL:
            raise NoMethod("a factorial of what is no natural number below 10^18")
        return self.flint.acb(argument.numerator + 1).gamma()

    def _extreme(self, name: str, arguments: tuple[Node, ...]) -> Any:
        values = [self.value(argument) for argument in arguments]
        if not all(value.imag.is_zero() for value in values):
            raise Unreadable(f"{name} of complex numbers")
        result = values[0].real
        for value in values[1:]:
            result = getattr(result, name)(value.real)
        return self.flint.acb(result)


def _is_negative(value: Any) -> bool:
    return bool(value.imag.is_zero() and value.real < 0)


def _in_degrees(node: Node) -> bool:
    return isinstance(node, Quantity) and node.unit == "degree"
