"""`verify`: does a prediction give the reference answer?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from eapo_fast.rewards.compare import compare
from eapo_fast.rewards.extract import extract_answer, extract_gold
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.lexer import clean, has_ambiguous_commas
from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.scalars import Arena, Outcome
from eapo_fast.rewards.tree import Node, Unreadable

Status = Literal["correct", "incorrect", "undecided"]
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one check."""

    status: Status
    """`undecided` means that neither equality nor difference is certain."""
    reason: str
    """Why, in words."""
    prediction: str | None
    """The answer found in the prediction; None if there is none."""
    gold: str | None
    """The reference answer as it was compared."""

    @property
    def correct(self) -> bool:
        """Whether the status is `correct`."""
        return self.status == "correct"


def verify(prediction: str, gold: str, *, extract: str = "auto") -> Verdict:
    """Compare the final answer of a text with the reference.

    Nothing is evaluated as code, and the work is bounded by steps: the verdict is a pure function
    of its arguments, whatever the load. Numbers are exact rationals, there is no rounding.

    Args:
        prediction: A completion, or an answer alone.
        gold: The reference: plain, between `$`, in a box, or a solution that ends in one or in
            `#### answer`.
        extract: How to find the answer in the prediction, see `extract_answer`.

    Raises:
        ConfigError: Unknown `extract`.
    """
    answer, reference = extract_answer(prediction, extract), extract_gold(gold)
    outcome = _judge(answer, reference)
    status: Status = "undecided"
    if outcome.equal is not None:
        status = "correct" if outcome.equal else "incorrect"
    return Verdict(status=status, reason=outcome.reason, prediction=answer, gold=reference)


def readable(answer: str) -> str | None:
    """Return None if an answer can be compared, else why not."""
    try:
        parse(answer)
    except Unreadable as reason:
        return str(reason)
    return None


def _judge(answer: str | None, reference: str | None) -> Outcome:
    if reference is None:
        return Outcome(None, "the reference answer is empty")
    if answer is None:
        return Outcome(False, "no answer found")
    try:
        texts = [_SPACES.sub(" ", clean(text)) for text in (answer, reference)]
    except Unreadable as reason:
        return Outcome(None, f"unreadable: {reason}")
    if texts[0] == texts[1]:
        return Outcome(True, "the same text")
    trees = []
    for side, text in zip(("prediction", "reference"), (answer, reference), strict=True):
        try:
            trees.append(_readings(text))
        except Unreadable as reason:
            return Outcome(None, f"unreadable {side}: {reason}")
    return _compare_readings(trees[0], trees[1], "\0".join(sorted(texts)))


def _readings(text: str) -> list[Node]:
    """Parse; `1,234` outside brackets has a second reading as a list."""
    readings = [parse(text)]
    if has_ambiguous_commas(text):
        other = parse(text, thousands=False)
        readings += [other] if other != readings[0] else []
    return readings


def _compare_readings(left: list[Node], right: list[Node], key: str) -> Outcome:
    arena = Arena(key, Meter())
    first: Outcome | None = None
    try:
        for a in left:
            for b in right:
                outcome = compare(a, b, arena)
                if outcome.equal:
                    return outcome
                first = first or outcome
    except Unreadable as reason:
        return Outcome(None, str(reason))
    return first or Outcome(None, "nothing to compare")
