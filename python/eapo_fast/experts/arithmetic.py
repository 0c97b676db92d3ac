"""Exact arithmetic and linear algebra over a small grammar; text is parsed, never executed.

    query    := sum [ "=" [ sum ] ]
    sum      := product { ("+" | "-") product }
    product  := signed { ("*" | "/" | "%" | "of" | nothing) signed }
    signed   := { "+" | "-" } power
    power    := postfix [ ("^" | "**") signed ]
    postfix  := atom { "%" }
    atom     := number | unknown | function "(" sum { "," sum } ")" | "(" sum ")"

An unknown is one letter, or one letter and an index (x_1). `%` before an operand is the remainder
(sign of the divisor), else it means hundredths. Values are exact rationals, or linear terms in
one unknown. Every limit is checked before the work it bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|([A-Za-z]+(?:_\w+)?)|(\*\*|[-+*/^%(),=]))")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
_SIGNS = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})


class Unreadable(ValueError):
    """The text is not in the grammar."""


class Unanswerable(ValueError):
    """The text is readable, but there is no exact answer within the limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what is computed."""

    bytes: int = 1024
    """Length of the query."""
    depth: int = 50
    """Nesting of parentheses and powers."""
    digits: int = 200
    """Decimal digits of any numerator or denominator on the way."""
    exponent: int = 1024
    """Size of an exponent."""

    def admit(self, value: Fraction) -> Fraction:
        """`value`, or Unanswerable if it has too many digits."""
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > self.digits * math.log2(10):
            raise Unanswerable(f"a number has more than {self.digits} digits")
        return value


@dataclass(frozen=True, slots=True)
class Linear:
    """`constant + slope * unknown`."""

    constant: Fraction
    slope: Fraction = Fraction(0)
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Solution:
    """The answer to a query: a value, an equation's root, or a word."""

    value: Linear | None = None
    """Value of an expression, or the root of an equation in `unknown`."""
    unknown: str = ""
    """The unknown that was solved for."""
    word: str = ""
    """"true", "false", "no solution" or "any number" for equations without a root."""


def solve(text: str, limits: Limits) -> Solution:
    """Evaluate an expression or solve an equation. Raises Unreadable or Unanswerable."""
    if len(text.encode(errors="replace")) > limits.bytes:
        raise Unanswerable(f"the query has more than {limits.bytes} bytes")
    parser = _Parser(_tokens(text), limits)
    left = parser.sum()
    right = None
    if parser.take("=") and not parser.at_end():
        right = parser.sum()
    if not parser.at_end():
        raise Unreadable(f"unexpected {parser.peek()!r}")
    return Solution(left) if right is None else _root(parser.arithmetic.add(left, right, -1))


def _root(difference: Linear) -> Solution:
    zero = difference.constant == 0
    if not difference.unknown:
        return Solution(word="true" if zero else "false")
    if difference.slope == 0:
        return Solution(word="any number" if zero else "no solution")
    root = Linear(-difference.constant / difference.slope)
    return Solution(root, difference.unknown)


def _tokens(text: str) -> list[str]:
    text = text.translate(_SIGNS)
    if not any(character.isalpha() for character in text):
        text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
    tokens, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable(f"cannot read {text[at : at + 12].strip()!r}")
        tokens.append(match.group().strip())
        at = match.end()
    return tokens


class _Arithmetic:
    """Operations on linear values; each result is within the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def make(self, constant: Fraction, slope: Fraction, unknown: str) -> Linear:
        return Linear(self.limits.admit(constant), self.limits.admit(slope), unknown)

    def add(self, a: Linear, b: Linear, sign: int = 1) -> Linear:
        unknown = _common(a, b)
        return self.make(a.constant + sign * b.constant, a.slope + sign * b.slope, unknown)

    def multiply(self, a: Linear, b: Linear) -> Linear:
        unknown = _common(a, b)
        if a.slope and b.slope:
            raise Unanswerable("only linear equations are solved")
        slope = a.constant * b.slope + b.constant * a.slope
        return self.make(a.constant * b.constant, slope, unknown)

    def divide(self, a: Linear, b: Linear) -> Linear:
        divisor = _number(b, "a divisor")
        if divisor == 0:
            raise Unanswerable("division by zero")
        return self.make(a.constant / divisor, a.slope / divisor, a.unknown)

    def remainder(self, a: Linear, b: Linear) -> Linear:
        value, divisor = _number(a, "a remainder"), _number(b, "a divisor")
        if divisor == 0:
            raise Unanswerable("division by zero")
        return self.make(value % divisor, Fraction(0), "")

    def power(self, base: Linear, exponent: Linear) -> Linear:
        by = _number(exponent, "an exponent")
        if by.denominator != 1 or abs(by) > self.limits.exponent:
            raise Unanswerable(f"an exponent must be whole and at most {self.limits.exponent}")
        if base.unknown and by == 1:
            return base
        value, times = _number(base, "a power"), int(by)
        if value == 0 and times < 0:
            raise Unanswerable("division by zero")
        bits = max(value.numerator.bit_length(), value.denominator.bit_length()) - 1
        if bits * abs(times) > self.limits.digits * math.log2(10):
            raise Unanswerable(f"a number has more than {self.limits.digits} digits")
        return self.make(value**times, Fraction(0), "")


def _common(a: Linear, b: Linear) -> str:
    if a.unknown and b.unknown and a.unknown != b.unknown:
        raise Unanswerable(f"two unknowns, {a.unknown} and {b.unknown}")
    return a.unknown or b.unknown


def _number(value: Linear, what: str) -> Fraction:
    if value.unknown:
        raise Unanswerable(f"{what} may not hold the unknown {value.unknown}")
    return value.constant


def _integers(values: list[Fraction]) -> list[int]:
    if any(value.denominator != 1 for value in values):
        raise Unanswerable("gcd and lcm take integers")
    return [int(value) for value in values]


def _square_root(values: list[Fraction]) -> Fraction:
    if len(values) != 1 or values[0] < 0:
        raise Unanswerable("sqrt takes one number that is not negative")
    top, bottom = math.isqrt(values[0].numerator), math.isqrt(values[0].denominator)
    if Fraction(top * top, bottom * bottom) != values[0]:
        raise Unanswerable("the square root is not a rational number")
    return Fraction(top, bottom)


def _single(function: Callable[[Fraction], int | Fraction]) -> Callable[[list[Fraction]], Fraction]:
    def call(values: list[Fraction]) -> Fraction:
        if len(values) != 1:
            raise Unanswerable("this function takes one number")
        return Fraction(function(values[0]))

    return call


FUNCTIONS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "gcd": lambda values: Fraction(math.gcd(*_integers(values))),
    "lcm": lambda values: Fraction(math.lcm(*_integers(values))),
    "sqrt": _square_root,
    "min": min,
    "max": max,
    "abs": _single(abs),
    "floor": _single(math.floor),
    "ceil": _single(math.ceil),
}


class _Parser:
    """Recursive descent that computes as it reads."""

    def __init__(self, tokens: list[str], limits: Limits) -> None:
        self.arithmetic = _Arithmetic(limits)
        self._limits = limits
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def peek(self) -> str:
        """The next token, or "" at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self._at >= len(self._tokens)

    def take(self, *tokens: str) -> str:
        """Read the next token if it is one of `tokens`, else return ""."""
        token = self.peek()
        if not token or token not in tokens:
            return ""
        self._at += 1
        return token

    def _expect(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"expected {token!r}, got {self.peek() or 'the end'!r}")

    def _starts_operand(self, at: int) -> bool:
        token = self._tokens[at] if at < len(self._tokens) else ""
        return token != "of" and bool(token) and (token[0].isalnum() or token[0] in ".(")

    def sum(self) -> Linear:
        """Read a sum."""
        self._deeper()
        value = self._product()
        while sign := self.take("+", "-"):
            value = self.arithmetic.add(value, self._product(), 1 if sign == "+" else -1)
        self._depth -= 1
        return value

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > self._limits.depth:
            raise Unanswerable(f"nested more than {self._limits.depth} deep")

    def _product(self) -> Linear:
        value = self._signed()
        while True:
            if self.take("*", "of"):
                value = self.arithmetic.multiply(value, self._signed())
            elif self.take("/"):
                value = self.arithmetic.divide(value, self._signed())
            elif self.take("%"):
                value = self.arithmetic.remainder(value, self._signed())
            elif self._joins():
                value = self.arithmetic.multiply(value, self._power())
            else:
                return value

    def _joins(self) -> bool:
        """Whether the next operand is multiplied without a sign, as in 2x or 3(4+5)."""
        token = self.peek()
        return token == "(" or (token[:1].isalpha() and token != "of")

    def _signed(self) -> Linear:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return self.arithmetic.multiply(Linear(Fraction(-1)), value) if negative else value

    def _power(self) -> Linear:
        base = self._postfix()
        if not self.take("^", "**"):
            return base
        self._deeper()
        exponent = self._signed()
        self._depth -= 1
        return self.arithmetic.power(base, exponent)

    def _postfix(self) -> Linear:
        value = self._atom()
        while self.peek() == "%" and not self._starts_operand(self._at + 1):
            self._at += 1
            value = self.arithmetic.divide(value, Linear(Fraction(100)))
        return value

    def _atom(self) -> Linear:
        token = self.peek()
        self._at += 1
        if token == "(":
            value = self.sum()
            self._expect(")")
            return value
        if token in FUNCTIONS:
            return self._call(token)
        if token[:1].isalpha() and token[1:2] in ("", "_"):
            return Linear(Fraction(0), Fraction(1), token)
        if token[:1].isdigit() or token[:1] == ".":
            return self._literal(token)
        raise Unreadable(f"expected a number, got {token or 'the end'!r}")

    def _literal(self, token: str) -> Linear:
        if len(token) > self._limits.digits:
            raise Unanswerable(f"a number has more than {self._limits.digits} digits")
        return Linear(Fraction(token))

    def _call(self, name: str) -> Linear:
        self._expect("(")
        values = [_number(self.sum(), name)]
        while self.take(","):
            values.append(_number(self.sum(), name))
        self._expect(")")
        return self.arithmetic.make(FUNCTIONS[name](values), Fraction(0), "")
