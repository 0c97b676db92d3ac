"""The grammar of values: sums, products, powers and what they are made of."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

from eapo_fast.rewards.cursor import Cursor
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
    Percent,
    Power,
    Product,
    Quantity,
    Quotient,
    SetOf,
    Signed,
    Sum,
    Symbol,
    Text,
    Unreadable,
    negated,
)
from eapo_fast.rewards.units import PERCENT, UNIT_LETTERS, canonical_unit, is_known

_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}
_STARTS = frozenset(("(", "[", "{", "\\{"))
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"))
_HALF = Number(Fraction(1, 2))


def literal(digits: str) -> Fraction:
    """Return the exact value of an unsigned decimal literal; raises `Unreadable` if huge."""
    mantissa, _, exponent = digits.lower().partition("e")
    whole, _, part = mantissa.partition(".")
    if len(whole) + len(part) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
    return Fraction(int(f"{whole}{part}" or "0")) * Fraction(10) ** (int(exponent or 0) - len(part))


class Arithmetic(Cursor, ABC):
    """Reads values; brackets hold whole answers, which a subclass reads."""

    @abstractmethod
    def listing(self) -> Node:
        """Read items between separators."""

    def chain(self, part: Callable[[], Node], mark: str) -> tuple[Node, ...]:
        """Read `part (mark part)*`."""
        parts = [part()]
        while self.accept(mark):
            parts.append(part())
        return tuple(parts)

    def sum(self) -> Node:
        """Read added terms."""
        with self.nested():
            terms = [self.product()]
            while sign := self.accept("+", "-", "+-", "-+"):
                term = self.product()
                terms.append(term if sign == "+" else _apply_sign(sign, term))
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def product(self) -> Node:
        """Read factors; a division applies to the next factor only."""
        signs = []
        while sign := self.accept("+", "-", "+-", "-+"):
            signs.append(sign)
        top, bottom = [self.power()], []
        while True:
            if self.accept("*"):
                top.append(self.signed_power())
            elif self.accept("/"):
                bottom.append(self.signed_power())
            elif self.factor_follows():
                top.append(self.juxtaposed(top, bottom))
            else:
                break
        if len(top) + len(bottom) > 1 and any(isinstance(part, Text) for part in top + bottom):
            raise Unreadable("words in a formula")
        value = _product(top)
        node: Node = Quotient(value, _product(bottom)) if bottom else value
        for sign in reversed(signs):
            node = node if sign == "+" else _apply_sign(sign, node)
        return node

    def signed_power(self) -> Node:
        """Read a factor that may carry a sign, as in `2 * -3`."""
        sign = self.accept("+", "-")
        node = self.power()
        return negated(node) if sign == "-" else node

    def juxtaposed(self, top: list[Node], bottom: list[Node]) -> Node:
        """Read a factor without operator; a whole number before a fraction is a mixed number."""
        previous, start = top[-1], self.index
        following = self.power()
        if bottom or len(top) > 1 or not _is_whole(previous):
            if self.tokens[start].kind == "number" and self.tokens[start - 1].kind == "number":
                raise Unreadable("two numbers in a row")
            return following
        part = following
        if self.tokens[start].kind == "number":
            if not (_is_whole(part) and self.accept("/")):
                raise Unreadable("two numbers in a row")
            part = Quotient(part, self.power())
        if isinstance(part, Quotient) and _is_whole(part.top) and _is_whole(part.bottom):
            top.pop()
            return Sum((previous, part))
        return part

    def factor_follows(self) -> bool:
        """Tell whether the next token starts a factor without an operator."""
        kind, text, spaced = self.token
        if kind == "symbol":
            behind = self.tokens[self.index - 1]
            is_unit = text in UNIT_LETTERS and spaced and behind.kind == "number"
            return not (is_unit and self.peek().kind == "end")
        if kind == "word":
            return not _is_unit_word(text, spaced)
        if kind == "mark":
            return text in _STARTS or (text == "|" and not self.bars)
        return kind in ("number", "command") and text not in ("setminus",)

    def power(self) -> Node:
        """Read a primary with its marks and exponent."""
        with self.nested():
            node = self.marks(self.primary())
            if not self.at("^"):
                return node
            self.advance()
            if self.degree_mark():
                return Quantity(node, "degree")
            return self.marks(Power(node, self.exponent()))

    def degree_mark(self) -> bool:
        """Take `\\circ` or `{\\circ}` behind a caret."""
        if self.accept("deg"):
            return True
        braced = self.at("{") and self.peek().text == "deg" and self.peek(2).text == "}"
        if braced:
            self.index += 3
        return braced

    def exponent(self) -> Node:
        """Read what stands behind a caret."""
        if self.accept("-"):
            return negated(self.exponent_body())
        self.accept("+")
        return self.exponent_body()

    def exponent_body(self) -> Node:
        with self.nested():
            body = self.primary()
            return Power(body, self.exponent()) if self.accept("^") else body

    def marks(self, node: Node) -> Node:
        """Read factorials, percent and degree marks (at most two)."""
        for _ in range(2):
            if self.accept("!"):
                node = Call("factorial", (node,))
            elif self.accept("%"):
                node = Percent(node)
            elif self.accept("deg"):
                node = Quantity(node, "degree")
            else:
                break
        return node

    # Primaries

    def primary(self) -> Node:
        """Read a number, name, bracket, fraction, root, function or matrix."""
        kind, text, _ = self.advance()
        if kind == "number":
            return self.number(text)
        if kind == "symbol":
            return self.symbol(text)
        if kind == "word" and len(text) <= 3:
            return Product(tuple(_name(letter) for letter in text))
        if kind in ("word", "text"):
            return Text(text)
        if kind == "begin":
            return self.matrix(text)
        if kind == "command":
            return self.command(text)
        if kind == "mark" and text in _STARTS:
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
        while self.token.kind in ("number", "symbol", "word", "text"):
            parts.append(self.advance().text)
        self.expect("}")
        return "".join(parts)

    def symbol(self, name: str) -> Node:
        """Read a variable, with its subscript."""
        if self.accept("_"):
            return Symbol(f"{name}_{self.subscript()}")
        return _name(name)

    def bracket(self, opening: str) -> Node:
        """Read what a bracket encloses: a group, tuple, interval or set."""
        with self.nested():
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

    def absolute(self) -> Node:
        """Read up to the closing bar."""
        with self.nested():
            self.bars += 1
            content = self.sum()
            self.expect("|")
            self.bars -= 1
        return Call("abs", (content,))

    def command(self, name: str) -> Node:
        """Read a LaTeX command or a named function."""
        with self.nested():
            if name == "frac":
                return Quotient(self.argument(), self.argument())
            if name == "surd":
                return Power(self.primary(), _HALF)
            if name == "sqrt":
                return self.root()
            if name in FUNCTIONS:
                return self.function(name)
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
        while self.factor_follows() and self.token.text not in FUNCTIONS:
            factors.append(self.power())
        argument = _product(factors)
        if Constant("pi") in factors and self.accept("/"):
            argument = Quotient(argument, self.power())
        return negated(argument) if negative else argument

    def matrix(self, name: str) -> Node:
        """Read the rows of a matrix environment."""
        if name not in _MATRICES:
            raise Unreadable(f"unknown environment {name}")
        if name == "array" and self.at("{"):
            while not self.accept("}"):
                if self.advance().kind == "end":
                    raise Unreadable("unbalanced braces")
        rows: list[tuple[Node, ...]] = []
        with self.nested():
            while self.token.kind != "end":
                rows.append(self.chain(self.sum, "&"))
                if not self.accept("\\\\"):
                    break
        if self.advance()[:2] != ("close", name):
            raise Unreadable(f"{name} is not closed")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("the rows of a matrix differ in length")
        return Matrix(tuple(rows))


def _is_unit_word(word: str, spaced: bool) -> bool:
    """Tell a unit or noun from a product of letters behind a value: `5cm`, `12 men` from `2xy`."""
    if len(word) > 3 or word.lower() in PERCENT or is_known(canonical_unit(word)):
        return True
    return spaced and any(letter in "aeiou" for letter in word.lower())


def _name(letter: str) -> Node:
    return Constant(letter) if letter in ("e", "i") else Symbol(letter)


def _product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _is_whole(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator == 1


def _apply_sign(sign: str, node: Node) -> Node:
    return negated(node) if sign == "-" else Signed(1 if sign == "+-" else -1, node)
