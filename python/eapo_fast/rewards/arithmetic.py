"""The grammar of values: sums, products and powers."""

from __future__ import annotations

from eapo_fast.rewards.cursor import nested
from eapo_fast.rewards.operators import product_of
from eapo_fast.rewards.primaries import STARTS, Primaries
from eapo_fast.rewards.tree import (
    Call,
    Node,
    Number,
    Percent,
    Power,
    Quantity,
    Quotient,
    Signed,
    Sum,
    Text,
    Unreadable,
    negated,
)
from eapo_fast.rewards.units import PERCENT, UNIT_LETTERS, canonical_unit, is_known

_LETTERS = ("symbol", "word")
_NO_FACTORS = frozenset(("choose", "over", "rfloor", "rceil"))


class Arithmetic(Primaries):
    """Reads values; brackets hold whole answers, which a subclass reads."""

    @nested
    def sum(self) -> Node:
        """Read added terms."""
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
        value = product_of(top)
        node: Node = Quotient(value, product_of(bottom)) if bottom else value
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
            part = Quotient(part, self.primary())
            if _is_proper(part):
                top.pop()
                return self.marks(Sum((previous, part)))
            raise Unreadable("two numbers in a row")
        match part:
            case Quotient() if _is_proper(part):
                top.pop()
                return Sum((previous, part))
            case Percent(Quotient() as fraction) if _is_proper(fraction):
                top.pop()
                return Percent(Sum((previous, fraction)))
            case Quantity(Quotient() as fraction, unit) if _is_proper(fraction):
                top.pop()
                return Quantity(Sum((previous, fraction)), unit)
        return part

    def factor_follows(self) -> bool:
        """Tell whether the next token starts a factor without an operator."""
        kind, text, spaced = self.token
        if kind == "symbol":
            behind = self.tokens[self.index - 1]
            is_unit = text in UNIT_LETTERS and spaced and behind.kind == "number"
            return not (is_unit and self.unit_ends())
        if kind == "word":
            return not _is_unit_word(text, spaced)
        if kind == "mark":
            return text in STARTS or (text == "|" and not self.bars)
        return kind in ("number", "command", "begin") and text not in _NO_FACTORS

    def unit_ends(self) -> bool:
        """Tell whether the answer ends behind a unit letter, or behind `m^2` or `m/s^2`."""
        ahead = self.power_end(1)
        if self.peek(ahead)[:2] == ("mark", "/") and self.peek(ahead + 1).kind in _LETTERS:
            ahead = self.power_end(ahead + 2)
        return self.peek(ahead).kind == "end"

    def power_end(self, ahead: int) -> int:
        """Return how far ahead it goes on behind a `^2` or `^{2}`, if that stands there."""
        if self.peek(ahead)[:2] != ("mark", "^"):
            return ahead
        if self.peek(ahead + 1).text == "{":
            return ahead + 4 if self.peek(ahead + 3).text == "}" else ahead
        return ahead + 2

    @nested
    def power(self) -> Node:
        """Read a primary with its marks and exponent."""
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

    @nested
    def exponent_body(self) -> Node:
        body = self.primary()
        return Power(body, self.exponent()) if self.accept("^") else body

    def marks(self, node: Node) -> Node:
        """Read factorials, percent and degree marks (at most two)."""
        for _ in range(2):
            if self.accept("!"):
                node = Call("factorial", (node,))
            elif self.accept("!!"):
                node = Call("double factorial", (node,))
            elif self.accept("%"):
                node = Percent(node)
            elif self.accept("deg"):
                node = Quantity(node, "degree")
            else:
                break
        return node


def _is_unit_word(word: str, spaced: bool) -> bool:
    """Tell a unit or noun from a product of letters behind a value: `5cm`, `12 men` from `2xy`."""
    if len(word) > 3 or word.lower() in PERCENT or is_known(canonical_unit(word)):
        return True
    return spaced and any(letter in "aeiou" for letter in word.lower())


def _is_proper(fraction: Quotient) -> bool:
    """Tell a fraction of whole numbers, which makes a mixed number behind another one."""
    return _is_whole(fraction.top) and _is_whole(fraction.bottom)


def _is_whole(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator == 1


def _apply_sign(sign: str, node: Node) -> Node:
    return negated(node) if sign == "-" else Signed(1 if sign == "+-" else -1, node)
