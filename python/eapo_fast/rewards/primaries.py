"""The grammar of what products are made of: numbers, names, brackets, functions, matrices."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

from eapo_fast.rewards.cursor import Cursor, nested
from eapo_fast.rewards.lexer import FUNCTIONS, Token
from eapo_fast.rewards.limits import MAX_DIGITS
from eapo_fast.rewards.tree import (
    INFINITY,
    MINUS_ONE,
    Bracketed,
    Call,
    Constant,
    Listing,
    Matrix,
    Node,
    Number,
    Numeral,
    Operator,
    Power,
    Product,
    Quotient,
    Relation,
    SetOf,
    Sum,
    Symbol,
    Text,
    Unreadable,
    negated,
)

STARTS = frozenset(("(", "[", "{", "\\{"))
"""Marks that open a bracket."""
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}
_MATRICES = frozenset(
    ("matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "smallmatrix", "array")
)
_OPERATORS = frozenset(("sum", "prod", "int", "lim"))
_ROUNDINGS = {"lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil")}
_HALF = Number(Fraction(1, 2))


def literal(digits: str) -> Fraction:
    """Return the exact value of an unsigned decimal literal; raises `Unreadable` if huge."""
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
    if digits.isdigit():
        return Fraction(int(digits))
    mantissa, _, power = digits.lower().partition("e")
    whole, _, part = mantissa.partition(".")
    exponent = int(power or 0) - len(part)
    if abs(exponent) > MAX_DIGITS:
        raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
    value = int(f"{whole}{part}" or "0")
    return Fraction(value * 10**exponent) if exponent >= 0 else Fraction(value, 10**-exponent)


class Primaries(Cursor, ABC):
    """Reads primaries; brackets hold whole answers, which a subclass reads."""

    @abstractmethod
    def listing(self) -> Node:
        """Read items between separators."""

    @abstractmethod
    def sum(self) -> Node:
        """Read added terms."""

    @abstractmethod
    def product(self) -> Node:
        """Read multiplied factors."""

    @abstractmethod
    def power(self) -> Node:
        """Read a primary with its marks and exponent."""

    @abstractmethod
    def exponent(self) -> Node:
        """Read what stands behind a caret."""

    @abstractmethod
    def marks(self, node: Node) -> Node:
        """Read factorials, percent and degree marks."""

    @abstractmethod
    def factor_follows(self) -> bool:
        """Tell whether the next token starts a factor without an operator."""

    def chain(self, part: Callable[[], Node], mark: str) -> tuple[Node, ...]:
        """Read `part (mark part)*`."""
        parts = [part()]
        while self.accept(mark):
            parts.append(part())
        return tuple(parts)

    def primary(self) -> Node:
        """Read a number, name, bracket, fraction, root, function or matrix."""
        kind, text, _ = self.advance()
        if kind == "number":
            return self.number(text)
        if kind == "symbol":
            return self.symbol(text)
        if kind == "word" and len(text) <= 3:
            return Product(tuple(named_letter(letter) for letter in text))
        if kind in ("word", "text"):
            return Text(text)
        if kind == "begin":
            return self.matrix(text)
        if kind == "command":
            return self.command(text)
        if kind == "mark" and text in STARTS:
            return self.bracket(text)
        if kind == "mark" and text == "|":
            return self.absolute()
        raise Unreadable(f"unexpected {text!r}" if text else "unexpected end")

    def number(self, digits: str) -> Node:
        """Read a literal, with its base if there is a subscript."""
        if not self.at("_"):
            return Number(literal(digits))
        self.advance()
        base = int(literal(re.sub(r"\D", "", self.subscript()) or "0"))
        if not digits.isdigit() or not 2 <= base <= 36 or any(int(d) >= base for d in digits):
            raise Unreadable(f"{digits} is no number of base {base}")
        literal(digits)
        return Numeral(digits, base)

    def subscript(self) -> str:
        """Take a subscript as text."""
        if not self.accept("{"):
            return self.advance().text
        parts = []
        while self.token.kind in ("number", "symbol", "word", "text") or self.at("+", "-", ","):
            parts.append(self.advance().text)
        self.expect("}")
        return "".join(parts)

    def symbol(self, name: str) -> Node:
        """Read a variable, with its subscript."""
        if self.accept("_"):
            return Symbol(f"{name}_{self.subscript()}")
        return named_letter(name)

    @nested
    def bracket(self, opening: str) -> Node:
        """Read what a bracket encloses: a group, tuple, interval or set."""
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.accept("\\}"):
            return SetOf(())
        content = self.listing()
        self.bars = bars
        closing = self.expect(*_CLOSING[opening])
        items = content.items if isinstance(content, Listing) else (content,)
        if opening == "\\{":
            return SetOf(items)
        if len(items) == 1 and closing == _CLOSING[opening][0]:
            return content
        return SetOf(items) if opening == "{" else Bracketed(opening, closing, items)

    @nested
    def absolute(self) -> Node:
        """Read up to the closing bar."""
        self.bars += 1
        content = self.sum()
        self.expect("|")
        self.bars -= 1
        return Call("abs", (content,))

    @nested
    def command(self, name: str) -> Node:
        """Read a LaTeX command or a named function."""
        if name in ("frac", "binom"):
            pair = self.argument(), self.argument()
            return Quotient(*pair) if name == "frac" else Call("binom", pair)
        if name == "surd":
            return Power(self.primary(), _HALF)
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name in _OPERATORS:
            return self.operator(name)
        if name in _ROUNDINGS:
            return self.rounding(*_ROUNDINGS[name])
        if name in ("pi", "inf"):
            return Constant(name)
        if name == "emptyset":
            return SetOf(())
        if name == "mathbb R":
            return Bracketed("(", ")", (negated(INFINITY), INFINITY))
        raise Unreadable(f"unknown command \\{name}")

    def argument(self) -> Node:
        """Read a LaTeX argument: a brace group, or a single digit, letter or command."""
        token = self.token
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.index] = Token("number", token.text[1:], False)
            return Number(Fraction(int(token.text[0])))
        return self.primary()

    def root(self) -> Node:
        """Read `[degree]{radicand}`."""
        degree: Node = Number(Fraction(2))
        if self.at("[") and not self.token.spaced:
            self.advance()
            degree = self.sum()
            self.expect("]")
        radicand = self.argument()
        if degree == Number(Fraction(2)):
            return Power(radicand, _HALF)
        return Call("root", (radicand, degree))

    def function(self, name: str) -> Node:
        """Read the power, base and argument of a function."""
        base: Node | None = None
        power: Node | None = None
        for _ in range(2):
            if self.accept("_"):
                base = self.argument()
            elif self.accept("^"):
                power = self.exponent()
        argument = self.function_argument()
        if isinstance(argument, Bracketed) and name in ("max", "min", "gcd", "lcm"):
            return Call(name, argument.items)
        if power == MINUS_ONE and name in ("sin", "cos", "tan"):
            return Call(f"arc{name}", (argument,))
        call = Call(name, (argument,) if base is None else (argument, base))
        return call if power is None else Power(call, power)

    def function_argument(self) -> Node:
        """Read one bracket, or the product that follows as in `sin 2x`."""
        if self.at("(", "[", "{"):
            return self.marks(self.primary())
        negative = self.accept("-")
        factors = [self.power()]
        while self.factor_follows() and not self.argument_ends():
            factors.append(self.power())
        argument = product_of(factors)
        if Constant("pi") in factors and self.accept("/"):
            argument = Quotient(argument, self.power())
        return negated(argument) if negative else argument

    def argument_ends(self) -> bool:
        """Tell whether the next token is a function or, in an integral, the differential."""
        kind, text, _ = self.token
        if kind == "command" and text in FUNCTIONS:
            return True
        word = kind == "word" and len(text) == 2 and text[0] == "d"
        return self.integrals > 0 and (word or (text == "d" and self.peek().kind == "symbol"))

    @nested
    def matrix(self, name: str) -> Node:
        """Read the rows of a matrix environment."""
        if name not in _MATRICES:
            raise Unreadable(f"unknown environment {name}")
        if name == "array" and self.at("{"):
            while not self.accept("}"):
                if self.advance().kind == "end":
                    raise Unreadable("unbalanced braces")
        rows: list[tuple[Node, ...]] = []
        while self.token.kind != "end":
            rows.append(self.chain(self.sum, "&"))
            if not self.accept("\\\\") or self.token.kind == "close":
                break
        if self.advance()[:2] != ("close", name):
            raise Unreadable(f"{name} is not closed")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("the rows of a matrix differ in length")
        matrix = Matrix(tuple(rows))
        return Call("det", (matrix,)) if name == "vmatrix" else matrix

    def rounding(self, name: str, closing: str) -> Node:
        """Read up to the closing bracket of a floor or ceiling."""
        content = self.sum()
        if self.advance()[:2] != ("command", closing):
            raise Unreadable(f"\\{closing} is missing")
        return Call(name, (content,))

    def operator(self, name: str) -> Node:
        """Read a sum, product, integral or limit with its bounds."""
        if name == "lim":
            return self.limit()
        lower = upper = None
        for _ in range(2):
            if self.accept("_"):
                lower = self.argument()
            elif self.accept("^"):
                upper = self.argument()
        if name == "int":
            return self.integral(() if lower is None or upper is None else (lower, upper))
        match lower:
            case Relation((Symbol(variable), first), ("=",)) if upper is not None:
                return Operator(name, self.product(), variable, (first, upper))
        raise Unreadable(f"\\{name} without bounds")

    def limit(self) -> Node:
        """Read `_{x to a} term`."""
        self.expect("_")
        self.expect("{")
        variable = self.advance()
        self.expect("to")
        target = self.sum()
        self.expect("}")
        if variable.kind != "symbol":
            raise Unreadable("a limit without a variable")
        return Operator("lim", self.product(), variable.text, (target,))

    def integral(self, bounds: tuple[Node, ...]) -> Node:
        """Read an integrand up to its differential; what is added behind it is added."""
        self.integrals += 1
        content = self.sum()
        self.integrals -= 1
        terms = list(content.terms) if isinstance(content, Sum) else [content]
        for index, term in enumerate(terms):
            found = _differential(term)
            if found is not None:
                integrand, variable = found
                body = Sum((*terms[:index], integrand)) if index else integrand
                value = Operator("int", body, variable, bounds)
                rest = terms[index + 1 :]
                return Sum((value, *rest)) if rest else value
        raise Unreadable("an integral without a differential")


def named_letter(letter: str) -> Node:
    """Return the constant or variable that a letter names."""
    return Constant(letter) if letter in ("e", "i") else Symbol(letter)


def product_of(factors: list[Node]) -> Node:
    """Return the product of at least one factor."""
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _differential(term: Node) -> tuple[Node, str] | None:
    """Split `f d x` into f and x; also `(dx / g)` into 1/g and x."""
    if isinstance(term, Quotient):
        found = _differential(term.top)
        return (Quotient(found[0], term.bottom), found[1]) if found else None
    factors = _flat(term)
    match factors:
        case [*rest, Symbol("d"), Symbol(name)]:
            return product_of(rest or [Number(Fraction(1))]), name
        case [*rest, Quotient() as last]:
            found = _differential(last)
            return (product_of([*rest, found[0]]), found[1]) if found else None
    return None


def _flat(node: Node) -> list[Node]:
    if not isinstance(node, Product):
        return [node]
    return [part for factor in node.factors for part in _flat(factor)]
