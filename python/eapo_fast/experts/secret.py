"""Keys that cannot be printed, and the redaction of text that may quote one."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import urllib.parse
import weakref
from os import PathLike
from pathlib import Path
from typing import NoReturn

from eapo_fast.errors import ConfigError
from eapo_fast.experts.sanitize import without_hidden

MASK = "[redacted]"
_LIVE: weakref.WeakSet[Secret] = weakref.WeakSet()
_LOOKS_SECRET = re.compile(
    r"(?i)(bearer\s+|basic\s+|(?:api[-_]?key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s\"',;&]+|\bsk-[\w-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


_LOGGERS = (
    "asyncio",
    "eapo_fast.experts",
    "httpx",
    *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")),
)
"""Loggers that may be handed what a server sent: its status line and headers, an exception."""


class _KeyFilter(logging.Filter):
    """Takes live keys out of log records: the second line of defence."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # a record that cannot be written shows nothing
            return True
        clean = scrub(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[1] is not None:
            text = logging.Formatter().formatException(record.exc_info)
            if scrub(text) != text:
                record.exc_text, record.exc_info = scrub(text), None
        return True


_FILTER = _KeyFilter()


class Secret:
    """A key whose every text form is masked; it can be neither pickled nor copied."""

    __slots__ = ("__weakref__", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        _LIVE.add(self)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_FILTER)

    def reveal(self) -> str:
        """The key itself: for a request header, nowhere else."""
        return self._value

    def forms(self) -> tuple[str, ...]:
        """The key as it may appear in text: raw, URL-encoded, and in base64."""
        raw = self._value.encode()
        encodings = (base64.b64encode(raw), base64.urlsafe_b64encode(raw))
        return (
            self._value,
            urllib.parse.quote(self._value, safe=""),
            json.dumps(self._value)[1:-1],
            repr(raw)[2:-1],
            *(form.decode().rstrip("=") for form in encodings),
        )

    def __repr__(self) -> str:
        return f"Secret({MASK})"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never written; store the name of its variable or file.")


def read_secret(env: str | None, file: str | PathLike[str] | None) -> Secret | None:
    """Read a key from a variable or a file; None if neither is named.

    ConfigError (which never shows the key) if both are named, or the key is missing or malformed.
    """
    if env is not None and file is not None:
        raise ConfigError("api_key_env and api_key_file are both given; give one of them.")
    if env is not None:
        return _checked(os.environ.get(env, ""), f"api_key_env: the variable {env}")
    if file is not None:
        return _checked(_read(Path(file)), f"api_key_file: {file}")
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"api_key_file: {path} cannot be read ({type(error).__name__}); "
            "name a readable text file that holds the key alone."
        ) from None


def _checked(value: str, where: str) -> Secret:
    key = value.strip()
    if not key:
        raise ConfigError(f"{where} holds no key; put the key there or drop the setting.")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{where} holds something that is not one printable ASCII word.")
    return Secret(key)


def scrub(text: str) -> str:
    """`text` without any live `Secret`: for replies, which may echo a key but are not ours."""
    if not text or not _LIVE:
        return text
    for secret in list(_LIVE):
        for form in secret.forms():
            text = text.replace(form, MASK)
    return text


def scrub_hidden(text: str) -> str:
    """`text` without any live `Secret`, however many hidden characters stand inside of one."""
    if not text or not _LIVE:
        return text
    text = scrub(text)
    bare = without_hidden(text)
    clean = scrub(bare)
    return text if clean == bare else clean


def redact(text: str) -> str:
    """`text` without any live `Secret` and without what looks like a credential."""
    if not text:
        return text
    text = scrub(text)
    return _LOOKS_SECRET.sub(lambda match: f"{match.group(1) or ''}{MASK}", text)
