"""Values of expressions: exact Gaussian rationals where possible, many digits otherwise."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from eapo_fast.rewards.limits import MAX_BITS, MAX_DECIMALS, MAX_FACTORIAL, Meter
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
    """A value is no Gaussian rational: it needs the numeric way."""


class Undefined(Exception):
    """An expression has no value here (a division by zero, the logarithm of zero)."""


class Gaussian(NamedTuple):
    """An exact complex rational."""

    re: Fraction
    im: Fraction = Fraction(0)


Point = Mapping[str, Fraction]
"""Values of the variables; `\\pi` and `\\e` hold the stand-ins of the transcendental constants."""

ZERO = Gaussian(Fraction(0))
ONE = Gaussian(Fraction(1))
_UNIT = Gaussian(Fraction(0), Fraction(1))


def exact(node: Node, point: Point, meter: Meter) -> Gaussian:
    """Evaluate a tree exactly.

    `pi` and `e` are transcendental, so in rational expressions they act as variables: `point`
    gives their stand-ins under the names `\\pi` and `\\e`.

    Raises:
        Inexact: A root, logarithm or the like is not rational.
        Undefined: A division by zero.
        Unreadable: A number exceeds `MAX_BITS` or the work exceeds the meter.
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
        case Constant(("pi" | "e") as name):
            return Gaussian(point[f"\\{name}"])
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


def numeric(node: Node, point: Point, context: Any, meter: Meter) -> Any:
    """Evaluate a tree with the digits of an `mpmath` context; raises as `exact` does."""
    meter.spend(10 + context.dps // 10)
    match node:
        case Number() | Numeral():
            value = context.mpf(node.value.numerator) / node.value.denominator
        case Symbol(name):
            value = context.mpf(point[name].numerator) / point[name].denominator
        case Constant("i"):
            value = context.mpc(0, 1)
        case Constant(("pi" | "e") as name):
            value = +getattr(context, name)
        case Quantity(operand, _):
            value = numeric(operand, point, context, meter)
        case Percent(operand):
            value = numeric(operand, point, context, meter) / 100
        case Sum(terms):
            value = context.fsum(numeric(term, point, context, meter) for term in terms)
        case Product(factors):
            value = context.fprod(numeric(factor, point, context, meter) for factor in factors)
        case Quotient(top, bottom):
            below = numeric(bottom, point, context, meter)
            if abs(below) < _tiny(context):
                raise Undefined("division by zero")
            value = numeric(top, point, context, meter) / below
        case Power(base, exponent):
            value = _numeric_power(base, exponent, point, context, meter)
        case Call(name, arguments):
            operands = [_radians(a, name, point, context, meter) for a in arguments]
            value = _numeric_call(name, operands, context)
        case _:
            raise Unreadable(f"{type(node).__name__} has no value")
    return _bounded(value, context)


def decimals(node: Node) -> int:
    """Return how many decimal digits tell this tree from a neighbour of its own size."""
    return math.ceil(0.302 * _bits(node))


def numeric_context(digits: int) -> Any:
    """Return this thread's `mpmath` context of that many digits.

    Raises:
        Unreadable: `digits` is above the limit.
    """
    if digits > MAX_DECIMALS:
        raise Unreadable(f"more than {MAX_DECIMALS} digits would be needed")
    context = getattr(_CONTEXTS, "context", None)
    if context is None:
        import mpmath  # type: ignore[import-untyped]

        context = _CONTEXTS.context = mpmath.MPContext()
    context.dps = digits
    return context


_CONTEXTS = threading.local()
"""mpmath changes the precision of a context while it works, so threads must not share one."""


# Exact arithmetic


def _metered(value: Gaussian, meter: Meter) -> Gaussian:
    size = max(_size(value.re), _size(value.im))
    if size > MAX_BITS:
        raise Unreadable(f"a number of more than {MAX_BITS} bits")
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
        raise Unreadable(f"a power of more than {MAX_BITS} bits")
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
    if name == "factorial":
        if first.im or first.re.denominator != 1 or first.re < 0:
            raise Unreadable("a factorial of what is no natural number")
        if first.re > MAX_FACTORIAL:
            raise Unreadable(f"a factorial above {MAX_FACTORIAL}")
        return _metered(Gaussian(Fraction(math.factorial(int(first.re)))), meter)
    raise Inexact


def _is_degree(value: Gaussian) -> bool:
    return not value.im and value.re.denominator == 1 and 1 <= value.re <= 1000


# Many digits

_LARGEST = 20_000
"""Largest binary exponent of a numeric value."""


def _tiny(context: Any) -> Any:
    return context.ldexp(1, -(3 * context.prec) // 4)


def _bounded(value: Any, context: Any) -> Any:
    if not context.isfinite(value):
        raise Undefined("not finite")
    if value and abs(context.mag(value)) > _LARGEST:
        raise Unreadable("a value out of range")
    return value


def _numeric_power(base: Node, exponent: Node, point: Point, context: Any, meter: Meter) -> Any:
    lower = numeric(base, point, context, meter)
    try:
        power = exact(exponent, point if _is_plain(exponent) else {}, meter)
    except (Inexact, KeyError):
        upper = numeric(exponent, point, context, meter)
    else:
        degree = power.re.denominator
        if not power.im and degree > 1 and degree % 2 and _is_negative(lower, context):
            lower = -lower
            sign = -1 if power.re.numerator % 2 else 1
            return sign * lower ** (context.mpf(power.re.numerator) / degree)
        upper = context.mpf(power.re.numerator) / degree
        if power.im:
            upper = numeric(exponent, point, context, meter)
        elif degree == 1:
            upper = power.re.numerator
    if abs(lower) < _tiny(context):
        if context.re(upper) > 0:
            return context.zero
        raise Undefined("a power of zero")
    if abs(upper) * (2 + abs(context.mag(lower))) > _LARGEST:
        raise Unreadable("a power out of range")
    return context.power(lower, upper)


def _is_plain(node: Node) -> bool:
    """Tell whether `exact` may evaluate the node at true values: no `pi` or `e` in it."""
    if isinstance(node, Constant) and node.name in ("pi", "e"):
        return False
    return all(_is_plain(child) for child in children(node))


def _is_negative(value: Any, context: Any) -> bool:
    return bool(abs(context.im(value)) < _tiny(context) and context.re(value) < 0)


def _radians(node: Node, name: str, point: Point, context: Any, meter: Meter) -> Any:
    value = numeric(node, point, context, meter)
    if isinstance(node, Quantity) and node.unit == "degree" and name in _TRIGONOMETRIC:
        return value * context.pi / 180
    return value


_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_MPMATH_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_POLES = {"tan": "cos", "sec": "cos", "cot": "sin", "csc": "sin"}


def _numeric_call(name: str, arguments: list[Any], context: Any) -> Any:
    first = arguments[0]
    if name in ("factorial", "root"):
        return _numeric_special(name, arguments, context)
    if name in ("log", "ln", "lg"):
        return _logarithm(name, arguments, context)
    if name == "abs":
        return abs(first)
    if name == "sqrt":
        return context.sqrt(first)
    if abs(first) > _LARGEST // 2:
        raise Unreadable(f"an argument of {name} out of range")
    if name in _POLES and abs(getattr(context, _POLES[name])(first)) < _tiny(context):
        raise Undefined(f"a pole of {name}")
    return getattr(context, _MPMATH_NAMES.get(name, name))(first)


def _numeric_special(name: str, arguments: list[Any], context: Any) -> Any:
    first = arguments[0]
    if name == "root":
        degree = arguments[1]
        if _is_negative(first, context) and context.isint(degree) and int(degree) % 2:
            return -((-first) ** (1 / degree))
        return first ** (1 / degree) if first else first
    if not context.isint(first) or not 0 <= first <= MAX_FACTORIAL:
        raise Unreadable("a factorial of what is no natural number")
    return context.mpf(math.factorial(int(first)))


def _logarithm(name: str, arguments: list[Any], context: Any) -> Any:
    if any(abs(argument) < _tiny(context) for argument in arguments):
        raise Undefined("a logarithm of zero")
    value = context.log(arguments[0])
    if len(arguments) == 1 and name != "lg":
        return value
    base = context.log(arguments[1] if len(arguments) > 1 else 10)
    if abs(base) < _tiny(context):
        raise Undefined("a logarithm to base one")
    return value / base


def _bits(node: Node) -> int:
    match node:
        case Number() | Numeral():
            return _size(node.value)
        case Power(base, exponent):
            degree = abs(exponent.value) if isinstance(exponent, Number) else Fraction(2)
            bound = 1.0 if degree < 1 else float(min(degree, Fraction(MAX_BITS)))
            return math.ceil((_bits(base) + 2) * bound) + 8
        case Call("factorial", (Number(value),)) if value <= MAX_FACTORIAL:
            return math.ceil(float(value) * 13) + 8
        case _:
            return sum(_bits(child) for child in children(node)) + 4
