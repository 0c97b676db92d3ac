"""From our syntax tree to sympy objects, by explicit constructors: sympy never sees a string.

(`Symbol(name)` and `Function(name)` take a name and do not parse it.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy as sp

from eapo_fast.rewards.limits import MAX_BITS, MAX_FACTORIAL
from eapo_fast.rewards.tree import (
    Bracketed,
    Call,
    Constant,
    Matrix,
    Node,
    Number,
    Numeral,
    Operator,
    Percent,
    Power,
    Product,
    Quantity,
    Quotient,
    Sum,
    Symbol,
    walk,
)


class NotBuilt(Exception):
    """A tree has no sympy object, or one that would be too large."""


_CONSTANTS = {"pi": sp.pi, "e": sp.E, "i": sp.I, "inf": sp.oo}
_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sin": sp.sin, "cos": sp.cos, "tan": sp.tan, "cot": sp.cot, "sec": sp.sec, "csc": sp.csc,
    "arcsin": sp.asin, "arccos": sp.acos, "arctan": sp.atan, "sinh": sp.sinh, "cosh": sp.cosh,
    "tanh": sp.tanh, "ln": sp.log, "log": sp.log, "exp": sp.exp, "sqrt": sp.sqrt, "abs": sp.Abs,
    "floor": sp.floor, "ceil": sp.ceiling, "max": sp.Max, "min": sp.Min, "gcd": sp.gcd,
    "lcm": sp.lcm, "binom": sp.binomial, "conj": sp.conjugate,
}  # fmt: skip
_LARGEST_MATRIX = 36


class Builder:
    """Builds both sides of one comparison with the same variables."""

    def __init__(self, *trees: Node) -> None:
        whole: set[str] = set()
        for node in (part for tree in trees for part in walk(tree)):
            if isinstance(node, Operator) and node.name in ("sum", "prod"):
                whole.add(node.variable)
                for bound in node.bounds:
                    whole |= {part.name for part in walk(bound) if isinstance(part, Symbol)}
        self.whole = whole
        self.bound: Mapping[str, Any] = {}

    def symbol(self, name: str) -> Any:
        """Return a real variable, or a whole one when it counts the terms of a sum."""
        if name in self.bound:
            return self.bound[name]
        base, _, index = name.partition("_")
        inside = [variable for bound, variable in self.bound.items() if bound in index]
        if inside:  # a sequence such as a_k under a sum over k: an unknown function of k
            return sp.Function(name)(*inside)
        if base in self.whole:
            return sp.Symbol(name, integer=True, positive=True)
        return sp.Symbol(name, real=True)

    def build(self, node: Node) -> Any:
        """Return the sympy object of a value or matrix; raises `NotBuilt`."""
        match node:
            case Number() | Numeral():
                return sp.Rational(node.value.numerator, node.value.denominator)
            case Symbol(name):
                return self.symbol(name)
            case Constant(name):
                return _CONSTANTS[name]
            case Sum(terms):
                return reduce(operator.add, map(self.build, terms))
            case Product(factors):
                return reduce(operator.mul, map(self.build, factors))
            case Quotient(top, bottom):
                return self.build(top) / self.build(bottom)
            case Power(base, exponent):
                return _power(self.build(base), self.build(exponent))
            case Percent(operand):
                return self.build(operand) / 100
            case Quantity(operand, _):
                return self.build(operand)
            case Call(name, arguments):
                return self._call(name, arguments)
            case Operator():
                return self._operator(node)
            case Matrix(rows) if len(rows) * len(rows[0]) <= _LARGEST_MATRIX:
                return sp.ImmutableMatrix([[self.build(item) for item in row] for row in rows])
            case Bracketed("(" | "[", ")" | "]", items) if len(items) <= _LARGEST_MATRIX:
                return sp.ImmutableMatrix([[self.build(item)] for item in items])
        raise NotBuilt(f"{type(node).__name__.lower()} is not for computer algebra")

    def _call(self, name: str, arguments: tuple[Node, ...]) -> Any:
        values = [self.build(argument) for argument in arguments]
        first, given = values[0], arguments[0]
        if name == "det":
            return first.det()
        if any(isinstance(value, sp.MatrixBase) for value in values):
            raise NotBuilt(f"{name} of a matrix")
        if name in _TRIGONOMETRIC and isinstance(given, Quantity) and given.unit == "degree":
            return _FUNCTIONS[name](first * sp.pi / 180)
        if name in ("factorial", "double factorial"):
            if first.is_Number and not abs(first) <= MAX_FACTORIAL:
                raise NotBuilt(f"a {name} that is too large")
            return sp.factorial(first) if name == "factorial" else sp.factorial2(first)
        if name == "binom" and any(v.is_Number and abs(v) > MAX_FACTORIAL for v in values):
            raise NotBuilt("a binomial coefficient that is too large")
        if name == "lg":
            return sp.log(first, 10)
        if name == "root":
            return _power(first, 1 / values[1])
        if name not in _FUNCTIONS:
            raise NotBuilt(f"{name} is not for computer algebra")
        return _FUNCTIONS[name](*values)

    def _operator(self, node: Operator) -> Any:
        bounds = [self.build(bound) for bound in node.bounds]
        kind = {"integer": True} if node.name in ("sum", "prod") else {"real": True}
        variable = sp.Symbol(f"{node.variable} bound", **kind)
        outer, self.bound = self.bound, {**self.bound, node.variable: variable}
        body = self.build(node.body)
        self.bound = outer
        match node.name, bounds:
            case "sum", [lower, sp.oo]:
                value = _geometric_series(body, variable, lower)
                return sp.Sum(body, (variable, lower, sp.oo)) if value is None else value
            case "sum", [lower, upper]:
                return sp.Sum(body, (variable, lower, upper))
            case "prod", [lower, upper]:
                return sp.Product(body, (variable, lower, upper))
            case "int", [lower, upper]:
                return sp.Integral(body, (variable, lower, upper))
            case "lim", [target]:
                return sp.Limit(body, variable, target, "-" if target == sp.oo else "+-")
        raise NotBuilt("an antiderivative is not unique")


def _geometric_series(body: Any, variable: Any, lower: Any) -> Any | None:
    """Return the value of an infinite geometric series; None for another one.

    sympy takes such a series for a hypergeometric one, whose formulas a worker cannot load.
    """
    ratio = sp.powsimp(body.subs(variable, variable + 1) / body)
    if not ratio.is_Rational or not 0 < abs(ratio) < 1:
        return None
    return body.subs(variable, lower) / (1 - ratio)


def _power(base: Any, exponent: Any) -> Any:
    if base.is_Rational and exponent.is_Rational and not base.is_zero:
        size = max(abs(base.p).bit_length(), base.q.bit_length())
        if size * abs(exponent) > MAX_BITS:
            raise NotBuilt("a power that is too large")
    if isinstance(base, sp.MatrixBase) and not (exponent.is_Integer and abs(exponent) <= 100):
        raise NotBuilt("a power of a matrix that is too large")
    return base**exponent
