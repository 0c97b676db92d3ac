"""The careless teacher of the warm start: right method, slips in results, help now and then.

It writes `a=48/2=24` lines and a boxed answer. Some results are slips, and the chain goes on from
the wrong value; some steps are asked of an expert, whose reply is copied when there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from eapo_fast.demo.chains import LETTERS, Chain, Step, apply, draw_step

OPERATIONS = "+++***---///"
"""Drawn from uniformly; GSM8K has fewer of the last two, which take longest to learn."""
MAX_QUERIES = 3
LARGEST = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How the teacher behaves; the policy imitates it."""

    slip: float = 0.0
    """Probability that an own result is wrong."""
    off_by_one: float = 0.5
    """Share of slips that are one too high; the others are up to 9 off either way."""
    asking: float = 0.0
    """Share of solutions in which the teacher asks at all."""
    ask: tuple[float, float] = (0.2, 1.0)
    """Range of the probability of a query at a step; one value is drawn for such a solution."""
    ask_ahead: float = 0.25
    """Probability that a further step that can be asked already joins the same block."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one author."""

    text: str
    """What was written."""
    own: bool
    """True for the policy's text (trained), False for advice and notices."""


def draw_chain(rng: np.random.Generator, steps: int, *, max_value: int) -> Chain:
    """Return a random chain in which most steps use the result before them."""
    made: list[Step] = []
    while len(made) < steps:
        op = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        step = draw_step(op, *_draw_refs(rng, len(made)), made, rng, max_value=max_value)
        if step is not None:
            made.append(step)
    return Chain(id="synthetic", steps=tuple(made))


def _draw_refs(rng: np.random.Generator, known: int) -> tuple[int | None, int | None]:
    if known == 0 or rng.random() < 0.15:
        return None, None
    last = known - 1 if rng.random() < 0.8 else int(rng.integers(known))
    other = int(rng.integers(known)) if rng.random() < 0.25 else None
    return (last, other) if rng.random() < 0.75 else (other, last)


def exact_text(op: str, left: int, right: int) -> str:
    """Return what a calculator says: `12`, `25/2`, or `` for a division by zero."""
    try:
        return str(apply(op, Fraction(left), Fraction(right)))
    except ZeroDivisionError:
        return ""


def own_result(op: str, left: int, right: int) -> int:
    """Return the exact result, or after an earlier slip the nearest number that can be written."""
    if op == "/" and right == 0:
        return 0
    return min(max(int(apply(op, Fraction(left), Fraction(right))), 0), LARGEST)


class Teacher:
    """Writes one solution; every choice comes from `rng`."""

    def __init__(self, chain: Chain, habits: Habits, rng: np.random.Generator) -> None:
        self._chain = chain
        self._habits = habits
        self._rng = rng
        self._ask = rng.uniform(*habits.ask) if rng.random() < habits.asking else 0.0
        self._acceptance = rng.random()
        self._values: list[int] = []
        self._advice: dict[int, str] = {}
        self._asked: set[int] = set()
        self.pieces: list[Piece] = []

    def write(self) -> list[Piece]:
        """Return the solution, piece by piece."""
        for index in range(len(self._chain.steps)):
            self._write_step(index)
        self._own(f"\\boxed{{{self._values[-1]}}}")
        return self.pieces

    def _own(self, text: str) -> None:
        self.pieces.append(Piece(text, own=True))

    def _operands(self, index: int) -> tuple[int, int]:
        step = self._chain.steps[index]
        left = step.left if step.left_ref is None else self._values[step.left_ref]
        right = step.right if step.right_ref is None else self._values[step.right_ref]
        return left, right

    def _expression(self, index: int) -> str:
        left, right = self._operands(index)
        return f"{left}{self._chain.steps[index].op}{right}"

    def _write_step(self, index: int) -> None:
        self._own(f"{LETTERS[index]}={self._expression(index)}=")
        if index not in self._asked and self._rng.random() < self._ask:
            self._consult(self._queries(index))
        self._values.append(self._result(index))
        self._own(f"{self._values[-1]}\n")

    def _queries(self, index: int) -> list[int]:
        """This step, and now and then later ones whose operands are known already."""
        later = range(index + 1, len(self._chain.steps))
        ready = [i for i in later if all(r < index for r in self._chain.steps[i].refs)]
        ahead = [i for i in ready if self._rng.random() < self._habits.ask_ahead]
        return [index, *ahead][:MAX_QUERIES]

    def _consult(self, indices: list[int]) -> None:
        queries = "".join(f"<q>{self._expression(i)}</q>" for i in indices)
        self._own(f"<consult>{queries}</consult>")
        replies = {i: self._reply(i) for i in indices}
        self._asked |= set(indices)
        self._advice |= {i: text for i, text in replies.items() if text}
        self.pieces.append(Piece(advice_text(list(replies.values())), own=False))

    def _reply(self, index: int) -> str:
        if self._rng.random() >= self._acceptance:
            return ""
        return exact_text(self._chain.steps[index].op, *self._operands(index))

    def _result(self, index: int) -> int:
        advice = self._advice.get(index, "")
        if advice.isdigit():
            return int(advice)
        value = own_result(self._chain.steps[index].op, *self._operands(index))
        return value if self._rng.random() >= self._habits.slip else self._slip(value)

    def _slip(self, value: int) -> int:
        if self._rng.random() < self._habits.off_by_one:
            return value + 1
        near = [v for v in range(max(value - 9, 0), value + 10) if v not in (value, value + 1)]
        return near[int(self._rng.integers(len(near)))]


def advice_text(replies: list[str]) -> str:
    """Return the engine's block for the replies to one consult; `` is a declined query."""
    if not any(replies):
        return "<advice>unavailable</advice>"
    answers = (f'<a i="{i}">{text or "unavailable"}</a>' for i, text in enumerate(replies, 1))
    return f"<advice>{''.join(answers)}</advice>"
