"""JSON lines that prove themselves: each carries a checksum of its own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from eapo_fast.errors import DataError

SUM = "sum"
_DIGITS = 16


def sealed(line: Mapping[str, Any]) -> str:
    """`line` as one line of JSON (no line break at the end) with its checksum as the last key."""
    text = json.dumps(line, separators=(",", ":"))
    return f'{text[:-1]}{"," if len(line) else ""}"{SUM}":"{_checksum(text)}"}}'


def unsealed(text: str) -> dict[str, Any]:
    """The content of a sealed line; DataError if it is cut, changed, or was never sealed."""
    body, found, tail = text.rstrip("\r\n").rpartition(f'"{SUM}":"')
    if not found or len(tail) != _DIGITS + 2 or not tail.endswith('"}'):
        raise DataError("the line has no checksum at its end")
    whole = f"{body.removesuffix(',')}}}"
    if _checksum(whole) != tail[:_DIGITS]:
        raise DataError("the line does not match its checksum")
    try:
        content = json.loads(whole)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError("the line is no JSON object")
    return content


def digest(text: str | bytes) -> str:
    """The first 16 hex digits of the SHA-256 of `text`."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _checksum(text: str) -> str:
    return digest(text)
