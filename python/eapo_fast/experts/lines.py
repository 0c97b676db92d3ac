"""JSON lines that prove themselves: each carries a checksum of its own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
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


def read_sealed(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `consults.jsonl`; a torn tail is left out.

    Raises:
        DataError: the file cannot be read, or a line of it (which is named) is damaged.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): a run writes it at its first consult"
        ) from None
    lines = []
    for number, text in enumerate(texts, 1):
        if not text:
            continue
        try:
            lines.append(unsealed(text))
        except DataError as error:
            if number == len(texts):
                break
            raise DataError(f"{path}, line {number}: {error}") from None
    return lines


def digest(text: str | bytes) -> str:
    """The first 16 hex digits of the SHA-256 of `text`."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _checksum(text: str) -> str:
    return digest(text)
