"""`verify`: does a prediction give the reference answer?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from eapo_fast.rewards.cleaning import clean, has_ambiguous_commas, split_choice, with_decimal_point
from eapo_fast.rewards.compare import compare
from eapo_fast.rewards.extract import boxes_of_last_line, extract_answer, extract_gold
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.scalars import Arena, Outcome
from eapo_fast.rewards.symbolic import STOPPED, NoWorkers, WorkerFailure, shared_pool
from eapo_fast.rewards.tree import Listing, Node, Text, Unreadable

SymbolicMethod: TypeAlias = Callable[[Node, Node, Arena], Outcome]
Status = Literal["correct", "incorrect", "undecided"]
_SPACES = re.compile(r"\s+")
_DECIMAL = re.compile(r"([-+]?)([0-9]+)(?:\.([0-9]*))?")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mbox)\{([^{}]*)\}")
_SHORT_NUMBER = 100
_LIST = re.compile(r",|;|\b(?:and|or)\b")


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
    of its arguments, whatever the load. Numbers are exact rationals, there is no rounding. Where
    the caller has left no stack or memory the verdict is `undecided`.

    Args:
        prediction: A completion, or an answer alone.
        gold: The reference: plain, between `$`, in a box, or a solution that ends in one or in
            `#### answer`.
        extract: How to find the answer in the prediction, see `extract_answer`.

    Raises:
        ConfigError: Unknown `extract`.
    """
    try:
        return _verified(prediction, gold, extract)
    except (RecursionError, MemoryError) as error:
        reason = f"no stack or memory left ({type(error).__name__})"
        return Verdict(status="undecided", reason=reason, prediction=None, gold=None)


def _verified(prediction: str, gold: str, extract: str) -> Verdict:
    answer, reference = extract_answer(prediction, extract), extract_gold(gold)
    outcome = _judge(answer, reference)
    if not outcome.equal:
        outcome = _second_look(prediction, gold, reference, extract) or outcome
    status: Status = "undecided"
    if outcome.equal is not None:
        status = "correct" if outcome.equal else "incorrect"
    return Verdict(status=status, reason=outcome.reason, prediction=answer, gold=reference)


def readable(answer: str) -> str | None:
    """Return None if an answer can be compared, else why not."""
    try:
        _readings(answer)
    except Unreadable as reason:
        return str(reason)
    return None


def compare_texts(answer: str, reference: str, symbolic: SymbolicMethod | None = None) -> Outcome:
    """Compare two extracted answers.

    Args:
        answer: The prediction's answer.
        reference: The gold answer.
        symbolic: Computer algebra for what the other methods leave open. Without it, an outcome
            that it might decide is `open`.
    """
    try:
        texts = _spaced(answer), _spaced(reference)
    except Unreadable as reason:
        return Outcome(None, f"unreadable: {reason}")
    if texts[0] == texts[1]:
        return Outcome(True, "the same text")
    numbers = _plain_number(texts[0]), _plain_number(texts[1])
    if None not in numbers:
        same = numbers[0] == numbers[1]
        return Outcome(same, "equal values" if same else "different values")
    if "\\text" in answer + reference and _without_text(texts[0]) == _without_text(texts[1]):
        return Outcome(True, "the same words")
    trees = []
    for side, text in (("prediction", answer), ("reference", reference)):
        try:
            trees.append(_readings(text))
        except Unreadable as reason:
            return Outcome(None, f"unreadable {side}: {reason}")
    if texts[0] > texts[1]:  # so that the verdict is the same with the sides exchanged
        trees.reverse()
    arena = Arena("\0".join(sorted(texts)), symbolic=symbolic)
    outcome = _compare_readings(trees[0], trees[1], arena)
    return outcome._replace(open=outcome.equal is None and arena.open)


def _judge(answer: str | None, reference: str | None) -> Outcome:
    if reference is None:
        return Outcome(None, "the reference answer is empty")
    if answer is None:
        return Outcome(False, "no answer found")
    outcome = _compare_cached(answer, reference)
    if not outcome.open:
        return outcome
    try:
        return _compare_symbolically(answer, reference)
    except NoWorkers as reason:
        return Outcome(None, f"{outcome.reason}; {reason}")
    except WorkerFailure:
        return Outcome(None, STOPPED)


def _second_look(prediction: str, gold: str, reference: str | None, extract: str) -> Outcome | None:
    """Accept the gold text itself, and several answers in as many boxes on the last line."""
    if prediction.strip() == gold.strip() != "":
        return Outcome(True, "the same text")
    if reference is None or extract not in ("auto", "boxed") or not _LIST.search(reference):
        return None
    boxes = boxes_of_last_line(prediction)
    if len(boxes) < 2:
        return None
    try:
        wanted = parse(reference)
    except Unreadable:
        return None
    if not isinstance(wanted, Listing) or len(wanted.items) != len(boxes):
        return None
    outcome = _judge(", ".join(boxes), reference)
    return outcome if outcome.equal else None


@lru_cache(maxsize=8192)
def _compare_cached(answer: str, reference: str) -> Outcome:
    return compare_texts(answer, reference)


@lru_cache(maxsize=4096)
def _compare_symbolically(answer: str, reference: str) -> Outcome:
    """Ask a worker; its failure raises, so it is not remembered."""
    reply = shared_pool().run({"prediction": answer, "reference": reference})
    return Outcome(reply["equal"], reply["reason"])


def _plain_number(text: str) -> tuple[str, str, str] | None:
    """Return sign, digits before and digits behind the point of a decimal, without idle zeros."""
    found = _DECIMAL.fullmatch(text) if len(text) <= _SHORT_NUMBER else None
    if found is None:
        return None
    sign, whole, part = found.groups()
    whole, part = whole.lstrip("0"), (part or "").rstrip("0")
    return "-" if sign == "-" and (whole or part) else "", whole, part


def _without_text(text: str) -> str:
    return _SPACES.sub(" ", _TEXT.sub(r"\1", text)).strip()


def _spaced(text: str) -> str:
    return _SPACES.sub(" ", clean(text))


def _readings(text: str) -> list[Node]:
    """Parse; `1,234` has a second reading as a list and `3,14` one as a decimal.

    `(B) 12` is both the choice and the value.
    """
    choice = split_choice(text)
    if choice is not None:
        return [Text(choice[0]), *_values(choice[1])]
    return _values(text)


def _values(text: str) -> list[Node]:
    readings = [parse(text)]
    if "," not in text:
        return readings
    if has_ambiguous_commas(text):
        other = parse(text, thousands=False)
        readings += [other] if other != readings[0] else []
    decimal = with_decimal_point(text)
    if decimal is not None:
        readings.append(parse(decimal))
    return readings


def _compare_readings(left: list[Node], right: list[Node], arena: Arena) -> Outcome:
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
