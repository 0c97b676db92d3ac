"""`Calculator`: an expert in the process that answers exactly, at once, and for nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction

from eapo_fast.experts.arithmetic import (
    Limits,
    Linear,
    Solution,
    Unanswerable,
    Unreadable,
    solve,
)
from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage

_LEAD = re.compile(r"^\s*(?:what\s+is|compute|calculate|evaluate|simplify|solve)\b\s*:?", re.I)
_UNKNOWN = re.compile(r"[A-Za-z]\w*")
_FOR = re.compile(r"\bfor\Z", re.I)


class Calculator:
    """Exact arithmetic and linear equations in one unknown (grammar: `experts.arithmetic`).

    "48/2" -> "24", "1/3+1/6" -> "1/2", "15% of 80" -> "12", "2*x+3=11" -> "x=4". With
    `decimals=True` a fraction with a finite decimal expansion is written as one ("0.5"). A query
    out of the grammar is `malformed`; one that it reads but cannot answer exactly within the
    limits (division by zero, an irrational root, a huge power) is `refused`.
    """

    immediate = True
    priced = True
    max_batch_size = 256

    def __init__(self, *, decimals: bool = False, limits: Limits | None = None) -> None:
        self.decimals = decimals
        self.limits = limits or Limits()

    @property
    def identity(self) -> str:
        """Part of cache keys."""
        return f"calculator:1:{self.decimals}:{asdict(self.limits)}"

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """Answer each query."""
        return [self.reply(request.query) for request in requests]

    def reply(self, query: str) -> ExpertReply:
        """The reply to one query."""
        try:
            text = self._written(solve(_bare(query, self.limits), self.limits))
        except Unreadable as error:
            return ExpertReply.failed("malformed", str(error), billed=False)
        except Unanswerable as error:
            return ExpertReply.failed("refused", str(error), billed=False)
        return ExpertReply(text, Usage(0, 0), "calculator")

    def worst_case(self, request: ConsultRequest) -> Usage:
        """A calculation uses no tokens and costs nothing."""
        return Usage(0, 0)

    def _written(self, solution: Solution) -> str:
        if solution.value is None:
            return solution.word
        text = self._linear(solution.value)
        return f"{solution.unknown}={text}" if solution.unknown else text

    def _linear(self, value: Linear) -> str:
        if not value.slope:
            return self._number(value.constant)
        size = abs(value.slope)
        term = value.unknown if size == 1 else f"{self._number(size)}*{value.unknown}"
        term = f"-{term}" if value.slope < 0 else term
        sign = "+" if value.constant > 0 else "-"
        return term if not value.constant else f"{term}{sign}{self._number(abs(value.constant))}"

    def _number(self, value: Fraction) -> str:
        return (_decimal(value) if self.decimals else None) or str(value)


def _bare(query: str, limits: Limits) -> str:
    """The query without the words around a calculation; an overlong one is left as it is."""
    if len(query) > limits.bytes:
        return query
    text = _LEAD.sub("", query, count=1).rstrip()
    text = text[:-1].rstrip() if text.endswith(("?", ".", ";")) else text
    words = text.rsplit(None, 1)
    if len(words) == 2 and _UNKNOWN.fullmatch(words[1]) and _FOR.search(words[0]):
        return words[0][:-3]
    return text


def _decimal(value: Fraction) -> str | None:
    """The finite decimal expansion, or None if there is none."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return None
    places = max(twos, fives)
    if places == 0:
        return str(value.numerator)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}"
