"""Reply text made safe: no control or hidden characters, a bounded length, no live tags."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LINE_BREAKS = re.compile("\r\n?|[\u0085\u2028\u2029\x0b\x0c]")
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f"
    "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")

OPENING = "\u2039"
"""Stands for the first character of an escaped tag: reads as "<", matches no tag."""


def clean_text(text: str, max_chars: int | None = None) -> tuple[str, bool]:
    """Return (clean text, whether it was cut at `max_chars`).

    Line breaks become "\\n"; other control characters (except tab), bidirectional controls,
    zero-width and tag characters are removed; lone surrogates become U+FFFD; outer blanks go.
    """
    bound = len(text) if max_chars is None else 4 * max_chars
    cut = len(text) > bound
    text = _LINE_BREAKS.sub("\n", text[:bound])
    text = whole_characters(_HIDDEN.sub("", text)).strip()
    if max_chars is not None and len(text) > max_chars:
        return text[:max_chars].rstrip(), True
    return text, cut


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each half of a character, which no tokenizer takes."""
    return _SURROGATES.sub("\ufffd", text)


def without_hidden(text: str) -> str:
    """`text` without the characters that `clean_text` removes."""
    return _HIDDEN.sub("", text)


def escape_tags(text: str, tags: Iterable[str], replacement: str = OPENING) -> str:
    """Make every tag in `text` unreadable as a tag, whatever its letter case.

    The first character of each occurrence, overlapping ones included, becomes `replacement`
    (U+2039 by default), so no tag can be left or be formed. Call it after `clean_text`, which
    removes characters and could thereby join the halves of a tag. ValueError if a tag is empty
    or contains `replacement`.
    """
    patterns = sorted(set(tags))
    if any(not tag or replacement.casefold() in tag.casefold() for tag in patterns):
        raise ValueError(f"a tag is empty or contains {replacement!r}; got {patterns!r}.")
    if not patterns:
        return text
    starts = "|".join(re.escape(tag) for tag in patterns)
    return re.sub(f"(?=(?:{starts})).", replacement, text, flags=re.IGNORECASE | re.DOTALL)
