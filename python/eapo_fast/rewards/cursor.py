"""A position in a token list, with a limit on nesting."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from eapo_fast.rewards.lexer import END, Token
from eapo_fast.rewards.limits import MAX_DEPTH
from eapo_fast.rewards.tree import Unreadable

_C = TypeVar("_C", bound="Cursor")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Cursor:
    """Reads one token list from left to right."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0
        self.bars = 0
        self.integrals = 0

    @property
    def token(self) -> Token:
        """The next token."""
        return self.tokens[self.index]

    def peek(self, ahead: int = 1) -> Token:
        """Return a later token (`END` behind the last)."""
        index = self.index + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def advance(self) -> Token:
        """Take the next token."""
        token = self.token
        if token.kind != "end":
            self.index += 1
        return token

    def at(self, *marks: str) -> bool:
        """Tell whether the next token is one of these marks."""
        return self.token.kind == "mark" and self.token.text in marks

    def accept(self, *marks: str) -> str | None:
        """Take the next token if it is one of these marks."""
        return self.advance().text if self.at(*marks) else None

    def expect(self, *marks: str) -> str:
        """Take one of these marks or raise."""
        if not self.at(*marks):
            raise Unreadable(f"expected {' or '.join(marks)}, got {self.token.text or 'the end'!r}")
        return self.advance().text


def nested(method: Callable[Concatenate[_C, _P], _R]) -> Callable[Concatenate[_C, _P], _R]:
    """Count a level of nesting while a method reads (an error ends the whole reading)."""

    @wraps(method)
    def read(self: _C, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH} levels")
        result = method(self, *arguments, **named)
        self.depth -= 1
        return result

    return read
