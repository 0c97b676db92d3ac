"""Does a reply state the reference answer? Then what the policy did with it shows nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from eapo_fast.rewards.extract import (
    _BOX,
    _box_at,
    after_answer_is,
    after_mark,
    extract_gold,
    first_expression,
    whole,
)
from eapo_fast.rewards.verdict import compare_texts

_BOXES = 16
_STATED = re.compile(
    r"=|\b(?:equals?|makes|gives|yields)\b"
    r"|\b(?:result|total|sum|value|solution|product|difference|quotient|amount)\b[^.\n=]{0,40}?"
    r"\b(?:is|are)\b",
    re.IGNORECASE,
)
_REACH = 48
"""Characters behind such a word in which its value is looked for."""
_STATEMENTS = 64
"""Most statements looked at, from the end."""
_LONGEST = 4096


def states_answer(reply: str, gold: str) -> bool:
    """Tell whether `reply` states the answer `gold`.

    Stated is what stands in a box, after `####`, after "answer is", right of an equals sign or
    after words such as "the total is", and a reply that is nothing but an answer. A number that is
    only mentioned ("divide by 2") is not stated. Equality is that of `rewards.verify` without
    computer algebra; what it cannot decide counts as not stated.
    """
    reference = extract_gold(gold)
    if reference is None or not reply.strip():
        return False
    return _states(reply[-_LONGEST:], reference)


@lru_cache(maxsize=4096)
def _states(reply: str, reference: str) -> bool:
    return any(compare_texts(found, reference).equal for found in _statements(reply))


def _statements(reply: str) -> Iterator[str]:
    for found in list(_BOX.finditer(reply))[-_BOXES:]:
        box = _box_at(reply, found.start())
        if box is not None:
            yield box[0]
    for find in (after_mark, after_answer_is, whole):
        answer = find(reply)
        if answer:
            yield answer
    for found in list(_STATED.finditer(reply))[-_STATEMENTS:]:
        value = _value(reply[found.end() : found.end() + _REACH])
        if value:
            yield value


def _value(text: str) -> str | None:
    """The expression that begins `text`, if one does (after blanks and an article)."""
    rest = re.sub(r"^(?:[\s:*]|(?:a|the|exactly|just|about)\s)+", "", text)
    clause = re.split(r"[,;\n]|\.(?=\s|$)|\s=", rest, maxsplit=1)[0].strip()
    if clause and whole(clause):
        return clause
    first = first_expression(clause)
    return first if first and clause.startswith((first, "$", "\\(")) else None
