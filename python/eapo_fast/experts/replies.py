"""From what an expert sent to what a rollout may read: cleaned, bounded, free of stated answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from eapo_fast.experts.base import ACCEPTED, ConsultStatus, ExpertReply
from eapo_fast.experts.sanitize import clean_text

if TYPE_CHECKING:
    from eapo_fast.experts.policy import ConsultPolicy

WITHHELD = "[answer withheld]"
"""Stands for a boxed answer that was redacted."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Shaped(NamedTuple):
    """A reply as the consult ends with it."""

    status: ConsultStatus
    """The reply's, unless nothing readable is left or it states an answer that is declined."""
    text: str
    """Empty unless accepted."""
    truncated: bool
    """Cut here or by the expert."""
    transforms: tuple[str, ...]
    """What was done: cleaned, cut, redacted, escaped."""
    detail: str
    """Why an accepted reply became a failure."""


def shape(reply: ExpertReply, policy: ConsultPolicy) -> Shaped:
    """Clean and bound a reply; what is left empty is `malformed`."""
    if reply.status not in ACCEPTED:
        return Shaped(reply.status, "", False, (), reply.detail)
    text, cut = clean_text(reply.text, policy.max_reply_chars)
    transforms = ["cleaned"] * (text != reply.text and not cut) + ["cut"] * cut
    if policy.answers != "keep" and _BOX.search(text):
        if policy.answers == "decline":
            return Shaped("refused", "", False, ("refused",), "the reply states a boxed answer")
        text = redact_boxes(text)
        transforms.append("redacted")
    status = reply.status if text else "malformed"
    detail = reply.detail if text else "nothing readable is left of the reply"
    return Shaped(status, text, cut or reply.truncated, tuple(transforms), detail)


def redact_boxes(text: str) -> str:
    """`text` with every `\\boxed{...}` replaced; one that never closes takes the rest along."""
    parts: list[str] = []
    position = 0
    while found := _BOX.search(text, position):
        parts += [text[position : found.start()], WITHHELD]
        position = _closing(text, found.end())
    return "".join(parts) + text[position:]


def _closing(text: str, start: int) -> int:
    """Where the group that is open at `start` ends, or the end of the text."""
    level, index = 1, start
    while index < len(text):
        character = text[index]
        index += 2 if character == "\\" else 1
        level += (character == "{") - (character == "}")
        if level == 0:
            return index
    return len(text)
