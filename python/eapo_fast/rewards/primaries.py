"""The grammar of what products are made of: numbers, names, brackets, fractions, functions."""

from __future__ import annotations

import re
from abc import abstractmethod
from fractions import Fraction

from eapo_fast.rewards.cursor import nested
from eapo_fast.rewards.lexer import FUNCTIONS, Token
from eapo_fast.rewards.limits import MAX_DIGITS
from eapo_fast.rewards.operators import Operators, product_of
from eapo_fast.rewards.tree import (
    MINUS_ONE,
    REALS,
    Bracketed,
    Call,
    Constant,
    Listing,
    Node,
    Number,
    Numeral,
    Power,
    Product,
    Quotient,
    SetOf,
    Symbol,
    Text,
    Unreadable,
    negated,
    walk,
)

STARTS = frozenset(("(", "[", "{", "\\{"))
"""Marks that open a bracket."""
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}
_OPERATORS = frozenset(("sum", "prod", "int", "lim"))
_ROUNDINGS = {"lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil")}
_HALF = Number(Fraction(1, 2))
_NUMERAL = re.compile(r"[0-9A-Z]+")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
          "ten": 10, "twelve": 12, "sixteen": 16, "hex": 16, "bin": 2}  # fmt: skip
_NUMBER_SETS = frozenset(("mathbb Z", "mathbb N", "mathbb Q", "mathbb C"))


def literal(digits: str) -> Fraction:
    """Return the exact value of an unsigned decimal literal; raises `Unreadable` if huge."""
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
    digits, _, repeated = digits.partition("r")
    if repeated:
        step = Fraction(1, 10 ** len(digits.partition(".")[2]))
        return literal(digits + "0") + step * Fraction(int(repeated), 10 ** len(repeated) - 1)
    if digits.isdigit():
        return Fraction(int(digits))
    mantissa, _, power = digits.lower().partition("e")
    whole, _, part = mantissa.partition(".")
    exponent = int(power or 0) - len(part)
    if abs(exponent) > MAX_DIGITS:
        raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
    value = int(f"{whole}{part}" or "0")
    return Fraction(value * 10**exponent) if exponent >= 0 else Fraction(value, 10**-exponent)


class Primaries(Operators):
    """Reads primaries; brackets hold whole answers, which a subclass reads."""

    @abstractmethod
    def listing(self) -> Node:
        """Read items between separators."""

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
        written = self.subscript().strip().lower()
        base = _BASES.get(written) or int(literal(re.sub(r"\D", "", written) or "0"))
        known = _NUMERAL.fullmatch(digits) and 2 <= base <= 36
        if not known or any(int(digit, 36) >= base for digit in digits):
            raise Unreadable(f"{digits} is no number of base {base}")
        if len(digits) > MAX_DIGITS:
            raise Unreadable(f"a literal of more than {MAX_DIGITS} digits")
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
        if not self.at("_", "'"):
            return named_letter(name)
        if self.accept("_"):
            name = f"{name}_{self.subscript()}"
        while self.accept("'"):
            name += "'"
        return Symbol(name)

    @nested
    def bracket(self, opening: str) -> Node:
        """Read what a bracket encloses: a group, tuple, interval or set."""
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.accept("\\}"):
            return SetOf(())
        if opening == "\\{" and self.token.kind == "symbol" and self.is_condition():
            content = self.listing()
            self.bars = bars
            self.expect("\\}")
            return content
        content = self.listing()
        content = self.infix(content)
        self.bars = bars
        closing = self.expect(*_CLOSING[opening])
        items = content.items if isinstance(content, Listing) else (content,)
        if opening == "\\{":
            return SetOf(items)
        if len(items) == 1 and closing == _CLOSING[opening][0]:
            return content
        return SetOf(items) if opening == "{" else Bracketed(opening, closing, items)

    def infix(self, top: Node) -> Node:
        """Read `\\choose` or `\\over` and what stands below `top`, if it follows."""
        if self.token[:2] == ("command", "choose"):
            self.advance()
            return Call("binom", (top, self.listing()))
        if self.token[:2] == ("command", "over"):
            self.advance()
            return Quotient(top, self.listing())
        return top

    def is_condition(self) -> bool:
        """Take `x |` or `x in R :` at the start of a set, which a condition on x follows."""
        start = self.index
        self.advance()
        if self.accept("in"):
            self.advance()
        if self.accept("|", ":"):
            return True
        self.index = start
        return False

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
        if name == "ldots":
            return Symbol("...")
        if name == "emptyset":
            return SetOf(())
        if name == "mathbb R":
            return REALS
        if name in _NUMBER_SETS:
            return Symbol(name)
        if name == "overline":
            return overlined(self.argument())
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
        if isinstance(argument, (Bracketed, SetOf)) and name in ("max", "min", "gcd", "lcm"):
            return Call(name, argument.items)
        if power == MINUS_ONE and name in ("sin", "cos", "tan"):
            return Call(f"arc{name}", (argument,))
        call = Call(name, (argument,) if base is None else (argument, base))
        return call if power is None else Power(call, power)

    def function_argument(self) -> Node:
        """Read one bracket, or the product that follows as in `sin 2x`."""
        if self.at("(", "[", "{", "\\{"):
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


def overlined(node: Node) -> Node:
    """Return the conjugate of a complex expression; over a letter a bar makes another name."""
    if Constant("i") in walk(node):
        return Call("conj", (node,))
    if isinstance(node, Symbol) and node.name.islower():
        return Symbol(f"{node.name} bar")
    return node


def named_letter(letter: str) -> Node:
    """Return the constant or variable that a letter names."""
    return Constant(letter) if letter in ("e", "i") else Symbol(letter)
