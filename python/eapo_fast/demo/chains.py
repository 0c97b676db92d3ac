"""Chains of integer steps: read from GSM8K calculator marks, checked, and resampled.

A chain is a list of binary steps; an operand is a literal or the result of an earlier step, which
is written with a letter (`a` is the first result): `48/2;a+48`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from eapo_fast.errors import DataError

Split = Literal["train", "test"]
"""`train` (operands are resampled) or `test` (held apart, the real figures)."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
LEXEME = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|[-+*/()])")
STEP = re.compile(r"([a-z]|\d+)([-+*/])([a-z]|\d+)")
SAMPLING_ATTEMPTS = 64
NEARNESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One binary operation on non-negative integers."""

    left: int
    """Value of the left operand."""
    op: str
    """One of `+ - * /`; a division is exact."""
    right: int
    """Value of the right operand."""
    left_ref: int | None = None
    """Index of the earlier step that gave `left`; None for a literal."""
    right_ref: int | None = None
    """Index of the earlier step that gave `right`; None for a literal."""

    @property
    def result(self) -> int:
        """The exact result; raises ArithmeticError for a division that is not exact."""
        value = apply(self.op, Fraction(self.left), Fraction(self.right))
        if value.denominator != 1:
            raise ArithmeticError(f"{self.expression} is not an integer")
        return int(value)

    @property
    def expression(self) -> str:
        """The step with its values, `24+48`."""
        return f"{self.left}{self.op}{self.right}"

    @property
    def text(self) -> str:
        """The step as the prompt gives it, with letters for earlier results, `a+48`."""
        left = self.left if self.left_ref is None else LETTERS[self.left_ref]
        right = self.right if self.right_ref is None else LETTERS[self.right_ref]
        return f"{left}{self.op}{right}"

    @property
    def refs(self) -> tuple[int, ...]:
        """Indices of the earlier steps that this one needs."""
        return tuple(ref for ref in (self.left_ref, self.right_ref) if ref is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The steps of one solution, each result of which but the last is used later."""

    id: str
    """Id of the GSM8K problem that the chain comes from."""
    steps: tuple[Step, ...]
    """The operations in the order of the solution."""

    @property
    def answer(self) -> int:
        """Result of the last step."""
        return self.steps[-1].result

    @property
    def values(self) -> tuple[int, ...]:
        """Every operand and result."""
        return tuple(v for s in self.steps for v in (s.left, s.right, s.result))

    @property
    def figures(self) -> tuple[str, ...]:
        """The expressions with their values: what makes two chains the same problem."""
        return tuple(step.expression for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return `{"id", "steps": ["48/2", "a+48"], "results": [24, 72]}`."""
        texts, results = zip(*((s.text, s.result) for s in self.steps), strict=True)
        return {"id": self.id, "steps": list(texts), "results": list(results)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Chain:
        """Read `to_json`'s form; raises DataError if a stored result is not the exact one."""
        steps = parse_steps(row["steps"])
        if [s.result for s in steps] != row["results"]:
            raise DataError(f"chain {row['id']}: stored results do not follow from its steps")
        return cls(id=row["id"], steps=steps)


def apply(op: str, left: Fraction, right: Fraction) -> Fraction:
    """Return `left op right`, exactly; raises ZeroDivisionError."""
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left / right
    raise ValueError(f"unknown operator {op!r}; allowed: + - * /")


def parse_steps(texts: Sequence[str]) -> tuple[Step, ...]:
    """Read `["48/2", "a+48"]`; raises DataError for anything but binary steps and known letters."""
    steps: list[Step] = []
    for text in texts:
        match = STEP.fullmatch(text)
        if match is None:
            raise DataError(f"step {text!r}: allowed are a+48, 48/2, b*a")
        (left, left_ref), (right, right_ref) = (_operand(match[i], steps) for i in (1, 3))
        steps.append(
            Step(left=left, op=match[2], right=right, left_ref=left_ref, right_ref=right_ref)
        )
    return tuple(steps)


def _operand(text: str, steps: Sequence[Step]) -> tuple[int, int | None]:
    if text.isdigit():
        return int(text), None
    index = LETTERS.index(text)
    if index >= len(steps):
        raise DataError(f"step {len(steps) + 1} needs the result {text!r}, which is not there yet")
    return steps[index].result, index


class _Reader:
    """Recursive descent over one calculator expression; appends binary steps as it goes."""

    def __init__(self, text: str, steps: list[Step]) -> None:
        self._steps = steps
        self._known = len(steps)
        self._lexemes = _lexemes(text)
        self._at = 0

    def read(self) -> tuple[int, int | None]:
        """Return value and step index of the whole expression."""
        operand = self._sum()
        if self._at != len(self._lexemes):
            raise DataError(f"unexpected {self._lexemes[self._at]!r}")
        return operand

    def _peek(self) -> str:
        return self._lexemes[self._at] if self._at < len(self._lexemes) else ""

    def _take(self) -> str:
        lexeme = self._peek()
        self._at += 1
        return lexeme

    def _sum(self) -> tuple[int, int | None]:
        left = self._product()
        while self._peek() in ("+", "-"):
            left = self._emit(left, self._take(), self._product())
        return left

    def _product(self) -> tuple[int, int | None]:
        left = self._atom()
        while self._peek() in ("*", "/"):
            left = self._emit(left, self._take(), self._atom())
        return left

    def _atom(self) -> tuple[int, int | None]:
        lexeme = self._take()
        if lexeme == "(":
            operand = self._sum()
            if self._take() != ")":
                raise DataError("a bracket is not closed")
            return operand
        if not lexeme.isdigit():
            raise DataError(f"{lexeme!r} is not an integer")
        return self._link(int(lexeme))

    def _link(self, value: int) -> tuple[int, int | None]:
        """A literal that equals a result of an earlier mark is that result (the latest one)."""
        for index in reversed(range(self._known)):
            if self._steps[index].result == value:
                return value, index
        return value, None

    def _emit(
        self, left: tuple[int, int | None], op: str, right: tuple[int, int | None]
    ) -> tuple[int, int]:
        step = Step(left=left[0], op=op, right=right[0], left_ref=left[1], right_ref=right[1])
        self._steps.append(step)
        return step.result, len(self._steps) - 1


def _lexemes(text: str) -> list[str]:
    """Split an expression into numbers and signs; raises DataError for other characters."""
    found, at = [], 0
    while at < len(text.rstrip()):
        match = LEXEME.match(text, at)
        if match is None:
            raise DataError(f"cannot read {text!r}")
        found.append(match[1])
        at = match.end()
    return found


def read_solution(problem_id: str, solution: str, answer: str, *, max_value: int) -> Chain | None:
    """Return the chain of a GSM8K solution, or None if it is not one.

    A chain has integer operands and results in 1..max_value, right arithmetic, the gold answer as
    its last result, and uses every other result later. Sums of several operands become binary
    steps from left to right.
    """
    steps: list[Step] = []
    try:
        for expression, result in MARK.findall(solution):
            value, _ = _Reader(expression.replace(",", ""), steps).read()
            if Fraction(result.replace(",", "")) != value:
                return None
        chain = Chain(id=problem_id, steps=tuple(steps))
        ok = bool(steps) and str(chain.answer) == answer and is_sound(chain, max_value=max_value)
    except (ArithmeticError, ValueError):
        return None
    return chain if ok else None


def is_sound(chain: Chain, *, max_value: int) -> bool:
    """Return whether all values lie in 1..max_value and each result but the last is used."""
    used = {ref for step in chain.steps for ref in step.refs}
    return (
        used == set(range(len(chain.steps) - 1))
        and len(chain.steps) <= len(LETTERS)
        and all(1 <= value <= max_value for value in chain.values)
    )


@cache
def load_chains(split: Split) -> tuple[Chain, ...]:
    """Return the committed chains of one split."""
    if split not in ("train", "test"):
        raise DataError(f"split: got {split!r}; allowed: 'train', 'test'")
    text = resources.files(__package__).joinpath(f"chains_{split}.json").read_text("utf-8")
    return tuple(Chain.from_json(row) for row in json.loads(text)["chains"])


def keyed_generator(seed: int, index: int) -> np.random.Generator:
    """Return the generator of one item: a pure function of its key, whatever came before it."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def resample(chain: Chain, rng: np.random.Generator, *, max_value: int) -> Chain | None:
    """Return the chain with new literals: the same operations and links, values in 1..max_value.

    A literal is log-uniform between a third and three times the old one, among those that keep the
    step's result within the limits. None if no try of 64 succeeded.
    """
    for _ in range(SAMPLING_ATTEMPTS):
        steps: list[Step] = []
        for old in chain.steps:
            refs = old.left_ref, old.right_ref
            step = draw_step(old.op, *refs, steps, rng, max_value=max_value, like=old)
            if step is None:
                break
            steps.append(step)
        else:
            return Chain(id=chain.id, steps=tuple(steps))
    return None


def draw_step(
    op: str,
    left_ref: int | None,
    right_ref: int | None,
    steps: Sequence[Step],
    rng: np.random.Generator,
    *,
    max_value: int,
    like: Step | None = None,
) -> Step | None:
    """Return a step `op` on the given earlier results and drawn literals; None if none fits.

    Literals are log-uniform, and of the size of those of `like`, where it is given.
    """
    left = None if left_ref is None else steps[left_ref].result
    right = None if right_ref is None else steps[right_ref].result
    if left is None:
        left = _draw(rng, _lefts(op, right, max_value), like.left if like else None)
    if right is None and left is not None:
        right = _draw(rng, _rights(op, left, max_value), like.right if like else None)
    if left is None or right is None or not _fits(op, left, right, max_value):
        return None
    return Step(left=left, op=op, right=right, left_ref=left_ref, right_ref=right_ref)


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Numbers to draw from, and their cumulative weights."""

    numbers: tuple[int, ...]
    cumulative: tuple[float, ...]

    @classmethod
    def log_uniform(cls, numbers: Sequence[int]) -> _Allowed:
        """Give every number a probability of about 1/number."""
        return cls(tuple(numbers), tuple(accumulate(1.0 / number for number in numbers)))


def _fits(op: str, left: int, right: int, max_value: int) -> bool:
    value = apply(op, Fraction(left), Fraction(right))
    return value.denominator == 1 and 1 <= value <= max_value


@cache
def _lefts(op: str, right: int | None, limit: int) -> _Allowed:
    """Left literals for which the step can end within 1..limit."""
    fitting = (v for v in range(2, limit + 1) if right is None or _fits(op, v, right, limit))
    return _Allowed.log_uniform(list(fitting))


@cache
def _rights(op: str, left: int, limit: int) -> _Allowed:
    """Right literals that keep the result within 1..limit; times 1 and over 1 are left out."""
    lowest = 2 if op in "*/" else 1
    return _Allowed.log_uniform([v for v in range(lowest, limit + 1) if _fits(op, left, v, limit)])


def _draw(rng: np.random.Generator, allowed: _Allowed, near: int | None) -> int | None:
    """Return an allowed number, within a factor of 3 of `near`; None if there is none."""
    start, stop = 0, len(allowed.numbers)
    if near is not None:
        start = bisect_left(allowed.numbers, near / NEARNESS)
        stop = bisect_right(allowed.numbers, near * NEARNESS)
    if start >= stop:
        return None
    low = allowed.cumulative[start - 1] if start else 0.0
    point = low + rng.random() * (allowed.cumulative[stop - 1] - low)
    return allowed.numbers[min(bisect_right(allowed.cumulative, point, start, stop), stop - 1)]


def iter_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Return the JSON objects of a JSONL file, blank lines skipped."""
    return (json.loads(line) for line in lines if line.strip())
