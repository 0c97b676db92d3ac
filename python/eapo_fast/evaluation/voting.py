"""Which answers of one problem are the same answer: the classes of a majority vote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from eapo_fast.rewards.verdict import compare_texts


def answer_classes(answers: Sequence[str | None]) -> list[int | None]:
    """Group equal answers; each class is named by the position of its first answer.

    An answer joins the first class whose first answer certainly equals it, without looking at the
    reference. Only the methods that need no worker process compare here: two formulas that only
    computer algebra could show equal stay apart. None (no answer found) has no class.
    """
    leaders: list[int] = []
    seen: dict[str, int] = {}
    classes: list[int | None] = []
    for index, answer in enumerate(answers):
        if answer is None:
            classes.append(None)
            continue
        if answer not in seen:
            seen[answer] = _leader(answer, answers, leaders)
            if seen[answer] < 0:
                seen[answer] = index
                leaders.append(index)
        classes.append(seen[answer])
    return classes


def _leader(answer: str, answers: Sequence[str | None], leaders: Sequence[int]) -> int:
    for leader in leaders:
        other = answers[leader]
        if other is not None and _equal(*sorted((answer, other))):
            return leader
    return -1


@lru_cache(maxsize=8192)
def _equal(left: str, right: str) -> bool:
    return bool(compare_texts(left, right).equal)
