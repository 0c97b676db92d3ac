"""Exact values of expressions: Gaussian rationals with limits on their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from eapo_fast.rewards.limits import MAX_BITS, MAX_FACTORIAL, Meter
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
    children,
)


class Inexact(Exception):
    """A value is no Gaussian rational: it needs another way."""


class Undefined(Exception):
    """An expression has no value here (a division by zero, the logarithm of zero)."""


class NoMethod(Unreadable):
    """An operation that these methods do not know, so computer algebra may help."""


class TooLarge(Unreadable):
    """A value has more digits than are computed exactly."""


class Gaussian(NamedTuple):
    """An exact complex rational."""

    re: Fraction
    im: Fraction = Fraction(0)


ZERO = Gaussian(Fraction(0))
ONE = Gaussian(Fraction(1))
_UNIT = Gaussian(Fraction(0), Fraction(1))


def exact(node: Node, point: Mapping[str, Fraction], meter: Meter) -> Gaussian:
    """Evaluate a tree exactly, with the values of its variables from `point`.

    Raises:
        Inexact: A root, logarithm or the like is not rational.
        Undefined: A division by zero.
        TooLarge: A number exceeds `MAX_BITS`.
        Unreadable: The work exceeds the meter.
    """
    match node:
        case Number(value):
            return Gaussian(value)
        case Numeral():
            return Gaussian(node.value)
        case Symbol(name):
            return Gaussian(point[name])
        case Constant("i"):
            return _UNIT
        case Sum(terms):
            total = ZERO
            for term in terms:
                total = _metered(_add(total, exact(term, point, meter)), meter)
            return total
        case Product(factors):
            total = ONE
            for factor in factors:
                total = _metered(_multiply(total, exact(factor, point, meter)), meter)
            return total
        case Quotient(top, bottom):
            below = exact(bottom, point, meter)
            return _metered(_multiply(exact(top, point, meter), _inverse(below)), meter)
        case Power(base, exponent):
            return _exact_power(exact(base, point, meter), exact(exponent, point, meter), meter)
        case Percent(operand):
            return _multiply(exact(operand, point, meter), Gaussian(Fraction(1, 100)))
        case Quantity(operand, _):
            return exact(operand, point, meter)
        case Call(name, arguments):
            return _exact_call(name, [exact(a, point, meter) for a in arguments], meter)
    raise Inexact


# Exact arithmetic


def _metered(value: Gaussian, meter: Meter) -> Gaussian:
    size = max(_size(value.re), _size(value.im))
    if size > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS} bits")
    meter.spend(2 + (size >> 10) ** 2)
    return value


def _size(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _add(a: Gaussian, b: Gaussian) -> Gaussian:
    return Gaussian(a.re + b.re, a.im + b.im if a.im or b.im else a.im)


def _multiply(a: Gaussian, b: Gaussian) -> Gaussian:
    if not a.im and not b.im:
        return Gaussian(a.re * b.re)
    return Gaussian(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re)


def _inverse(a: Gaussian) -> Gaussian:
    norm = a.re * a.re + a.im * a.im
    if not norm:
        raise Undefined("division by zero")
    return Gaussian(a.re / norm, -a.im / norm)


def _exact_power(base: Gaussian, exponent: Gaussian, meter: Meter) -> Gaussian:
    if exponent.im:
        raise Inexact
    if exponent.re.denominator != 1:
        base = _exact_root(base, exponent.re.denominator)
    count = exponent.re.numerator
    if base == ZERO and count <= 0:
        raise Undefined("zero to a power that is not positive")
    if count < 0:
        base, count = _inverse(base), -count
    if base in (ZERO, ONE):
        return base
    if count * max(_size(base.re), _size(base.im)) > 2 * MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS} bits")
    if not base.im:
        return _metered(Gaussian(base.re**count), meter)
    result = ONE
    for digit in bin(count)[2:]:
        result = _metered(_multiply(result, result), meter)
        result = _multiply(result, base) if digit == "1" else result
    return result


def _exact_root(base: Gaussian, degree: int) -> Gaussian:
    """Return the root if it is rational; a negative radicand has real odd roots."""
    if base.im or degree > MAX_BITS:
        raise Inexact
    top, bottom = abs(base.re.numerator), base.re.denominator
    root = Fraction(_integer_root(top, degree), _integer_root(bottom, degree))
    if base.re >= 0:
        return Gaussian(root)
    if degree == 2:
        return Gaussian(Fraction(0), root)
    if degree % 2:
        return Gaussian(-root)
    raise Inexact


_LARGEST_ROOT = 4096
"""Most bits of a radicand whose cube root (or higher) is looked for."""


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() > _LARGEST_ROOT:
        raise Inexact
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise Inexact
    return root


def _exact_call(name: str, arguments: list[Gaussian], meter: Meter) -> Gaussian:
    first = arguments[0]
    if name == "abs" and not first.im:
        return Gaussian(abs(first.re))
    if name == "root" and _is_degree(arguments[1]):
        return _exact_root(first, int(arguments[1].re))
    if name == "conj":
        return Gaussian(first.re, -first.im)
    if name in ("factorial", "double factorial"):
        return _metered(Gaussian(Fraction(_exact_factorial(first, name))), meter)
    if name in _OF_RATIONALS and not any(argument.im for argument in arguments):
        return _metered(Gaussian(_rational_call(name, [a.re for a in arguments])), meter)
    raise Inexact


def _exact_factorial(argument: Gaussian, name: str) -> int:
    if argument.im or argument.re.denominator != 1 or argument.re < 0:
        raise NoMethod(f"a {name} of what is no natural number")
    if argument.re > MAX_FACTORIAL:
        raise TooLarge(f"a {name} above {MAX_FACTORIAL}")
    if name == "factorial":
        return math.factorial(int(argument.re))
    return math.prod(range(int(argument.re), 0, -2))


_OF_RATIONALS = frozenset(("floor", "ceil", "max", "min", "gcd", "lcm", "binom"))


def _rational_call(name: str, values: list[Fraction]) -> Fraction:
    if name in ("floor", "ceil"):
        return Fraction(getattr(math, name)(values[0]))
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(value.denominator != 1 for value in values):
        raise Inexact
    whole = [value.numerator for value in values]
    if name in ("gcd", "lcm"):
        return Fraction(getattr(math, name)(*whole))
    if whole[0] < 0 or whole[0] > MAX_FACTORIAL:
        raise Inexact
    return Fraction(math.comb(*whole) if whole[1] >= 0 else 0)


def _is_degree(value: Gaussian) -> bool:
    return not value.im and value.re.denominator == 1 and 1 <= value.re <= 1000


def literal_bits(node: Node) -> int:
    """Return how many bits the literals of a tree have, with those that powers make of them."""
    match node:
        case Number() | Numeral():
            return _size(node.value)
        case Power(base, exponent):
            degree = abs(exponent.value) if isinstance(exponent, Number) else Fraction(2)
            bound = 1.0 if degree < 1 else float(min(degree, Fraction(MAX_BITS)))
            return math.ceil((literal_bits(base) + 2) * bound) + 8
        case Call("factorial", (Number(value),)) if value <= MAX_FACTORIAL:
            return math.ceil(float(value) * 13) + 8
        case _:
            return sum(literal_bits(child) for child in children(node)) + 4
