"""Pattern search on decoded bytes, without an automaton."""

from __future__ import annotations

from collections.abc import Sequence


def first_match(text: bytes, start: int, patterns: Sequence[bytes]) -> tuple[int, int]:
    """(pattern, bytes behind its end) of the first match that ends after `start`, or (-1, 0).

    Of several that end at one byte the longest counts.
    """
    for end in range(start + 1, len(text) + 1):
        found = [i for i, pattern in enumerate(patterns) if text[:end].endswith(pattern)]
        if found:
            return max(found, key=lambda i: len(patterns[i])), len(text) - end
    return -1, 0


def completing_tokens(
    text: bytes, patterns: Sequence[bytes], token_bytes: Sequence[bytes]
) -> list[int]:
    """Tokens behind which `text` would hold a match that ends inside the token."""
    return [
        token
        for token, piece in enumerate(token_bytes)
        if first_match(text + piece, len(text), patterns)[0] >= 0
    ]
