"""The grammar of answers: a recursive-descent parser with limits on depth and size.

answer   := item ((',' | ';' | 'or' | 'and') item)*
item     := union (('=' | '<' | ...) union)*
union    := meet ('cup' meet)*
meet     := ratio (('cap' | 'setminus') ratio)*
ratio    := sum (':' sum)*
sum      := product (('+' | '-' | '+-' | '-+') product)*
product  := factor (['*' | '/'] factor)*
factor   := '-'* power;  power := primary postfix* ['^' exponent]
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from eapo_fast.rewards.arithmetic import Arithmetic
from eapo_fast.rewards.cleaning import clean
from eapo_fast.rewards.cursor import nested
from eapo_fast.rewards.lexer import tokenize
from eapo_fast.rewards.limits import MAX_ITEMS
from eapo_fast.rewards.tree import (
    Combined,
    Listing,
    Node,
    Number,
    Percent,
    Product,
    Quantity,
    Ratio,
    Relation,
    Text,
    Union,
    Unreadable,
)
from eapo_fast.rewards.units import PERCENT, SCALES, canonical_unit

_RELATIONS = frozenset(("=", "<", "<=", ">", ">=", "!=", "in", "approx"))
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}")
_SEPARATORS = frozenset((",", ";", "or", "and"))


def parse(text: str, *, thousands: bool = True) -> Node:
    """Read an answer (LaTeX or plain) as a tree.

    Args:
        text: The answer alone, as `extract` returns it; math delimiters are allowed.
        thousands: Read `1,234` outside brackets as one number (else as two).

    Raises:
        Unreadable: The text is no answer of the grammar or exceeds a limit of `limits`.
    """
    return (_parse_short if len(text) <= _CACHED_LENGTH else _parse)(text, thousands)


def _parse(text: str, thousands: bool) -> Node:
    cleaned = clean(text)
    if _DATE.fullmatch(cleaned):
        return Text(cleaned)
    return Parser(tokenize(cleaned, thousands=thousands)).answer()


_CACHED_LENGTH = 128
"""Answers up to this length are remembered, as a group gives the same few again and again."""
_parse_short = lru_cache(maxsize=4096)(_parse)


class Parser(Arithmetic):
    """Reads one answer; `answer` is the only entry."""

    def answer(self) -> Node:
        """Read the whole token list."""
        words = self.only_words()
        if words is not None:
            return Text(words)
        node = self.infix(self.listing())
        if self.token.kind != "end":
            raise Unreadable(f"unexpected {self.token.text!r}")
        return node

    def only_words(self) -> str | None:
        """Return the words if there is nothing but words, at least one of two letters."""
        tokens = self.tokens[:-1]
        wordy = all(
            t.kind in ("word", "symbol", "text") or t.text in ("or", "and", "in") for t in tokens
        )
        if not wordy or not any(t.kind in ("word", "text") for t in tokens):
            return None
        return " ".join(t.text for t in tokens)

    def listing(self) -> Node:
        """Read items between separators; semicolons between lists with commas separate lists."""
        groups: list[list[Node]] = [[self.item()]]
        joined = False
        while separator := self.accept(*_SEPARATORS):
            if separator in (",", ";") and self.at("or", "and"):
                separator = self.advance().text
            joined = joined or separator == "and"
            if separator == ";":
                groups.append([])
            groups[-1].append(self.item())
        if sum(map(len, groups)) > MAX_ITEMS:
            raise Unreadable(f"more than {MAX_ITEMS} items")
        if len(groups) > 1 and all(len(group) > 1 for group in groups):
            return Listing(tuple(Listing(tuple(group)) for group in groups), joined)
        items = tuple(item for group in groups for item in group)
        return items[0] if len(items) == 1 else Listing(items, joined)

    @nested
    def item(self) -> Node:
        """Read a chain of relations; a chain of one side is that side."""
        sides, operators = [self.union()], []
        while self.token.kind == "mark" and self.token.text in _RELATIONS:
            operators.append(self.advance().text)
            sides.append(self.union())
        return Relation(tuple(sides), tuple(operators)) if operators else sides[0]

    def union(self) -> Node:
        """Read sets joined by a cup."""
        parts = self.chain(self.intersection, "cup")
        return parts[0] if len(parts) == 1 else Union(parts)

    def intersection(self) -> Node:
        """Read sets between which a cap or a minus for sets stands."""
        node = self.ratio()
        while operation := self.accept("cap", "setminus"):
            node = Combined(operation, node, self.ratio())
        return node

    def ratio(self) -> Node:
        """Read values joined by colons, with the unit behind each."""
        parts = self.chain(self.quantity, ":")
        return parts[0] if len(parts) == 1 else Ratio(parts)

    def quantity(self) -> Node:
        """Read a value and the words behind it: a scale, a base, a unit."""
        value = self.sum()
        while self.token.text.strip().lower() in SCALES:
            scale = SCALES[self.advance().text.strip().lower()]
            value = Product((value, Number(Fraction(scale))))
        if self.token.text.strip().lower() in PERCENT:
            self.advance()
            value = Percent(value)
        unit = self.unit()
        return Quantity(value, unit) if unit else value

    def unit(self) -> str:
        """Take unit words (and `^2`, `/`) up to what is none; returns the canonical spelling."""
        words: list[str] = []
        while self.token.kind in ("word", "text") or (
            self.token.kind == "symbol" and (words or self.token.spaced)
        ):
            words.append(self.advance().text)
            if self.accept("^"):
                braced = self.accept("{")
                words.append(self.advance().text)
                if braced:
                    self.expect("}")
            if self.at("/") and self.peek().kind in ("word", "text", "symbol"):
                words.append(self.advance().text)
        return canonical_unit(" ".join(words)) if words else ""
