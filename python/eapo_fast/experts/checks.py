"""Settings of experts, checked before anything is sent: each error names setting, value, remedy."""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from eapo_fast.errors import ConfigError

REPLY_CAPS = ("max_tokens", "max_completion_tokens")
"""Fields of a request that bound what is written; the budget reserves the largest."""
_ENDPOINT = "/chat/completions"


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (True and False are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def checked_number(name: str, value: Any, least: float = -math.inf) -> float:
    """`value`, a finite number of at least `least`."""
    if not is_number(value) or value < least:
        wanted = "a finite number" + ("" if math.isinf(least) else f" of {least:g} or more")
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}.")
    return value  # type: ignore[no-any-return]


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """`value`, a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")
    return value


def checked_text(name: str, value: Any) -> str:
    """`value`, text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name} is {value!r}; it must be text that is not empty.")
    return value


def checked_prompt(prompt: Any) -> str:
    """A template of the question to an expert."""
    if "{query}" not in checked_text("prompt", prompt):
        raise ConfigError("prompt has no {query}; the expert would never see the question.")
    return str(prompt)


def checked_prices(prices: Any) -> tuple[float, float] | None:
    """(per million tokens read, per million written), or None."""
    if prices is None:
        return None
    pair = isinstance(prices, tuple | list) and len(prices) == 2
    if not pair or not all(is_number(value) and value >= 0 for value in prices):
        raise ConfigError(f"prices is {prices!r}; give (per million read, written), 0 or more.")
    return prices[0], prices[1]


def checked_extra(extra: Any) -> dict[str, Any]:
    """Fields for the body of a request that leave us our own: question, one answer, no stream."""
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra_body is {extra!r}; it must be a mapping of names to values.")
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError("extra_body must be JSON: text, numbers, lists, objects.") from None
    remedies: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "messages": ("they are made from system and prompt", lambda value: True),
        "stream": ("a reply is read as a whole", bool),
        "n": ("a consult has one answer; ask again with another sample_index", _several),
        "best_of": ("a consult has one answer", _several),
    }
    for name, (reason, wrong) in remedies.items():
        if name in extra and wrong(extra[name]):
            raise ConfigError(f"extra_body[{name!r}] is {extra[name]!r}: leave it out, {reason}.")
    return dict(extra)


def _several(value: Any) -> bool:
    return value not in (None, 1)


def body_options(
    model: str, max_reply_tokens: int, temperature: float, extra: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """The fields of a request besides its messages, and the most tokens that they let be written.

    A field that `extra` sets to None is left out. ConfigError if nothing bounds the reply then: a
    budget could not hold.
    """
    standard = {"model": model, "max_tokens": max_reply_tokens, "temperature": temperature}
    sent = {name: value for name, value in {**standard, **extra}.items() if value is not None}
    caps = [checked_count(f"extra_body[{n!r}]", sent[n]) for n in REPLY_CAPS if n in sent]
    if not caps:
        raise ConfigError(
            "extra_body takes max_tokens away and puts nothing in its place; give "
            "max_completion_tokens, so that a reply has a bound."
        )
    return sent, max(caps)


def checked_url(base_url: Any) -> str:
    """The address of an API, without a slash at its end and without anything secret in it."""
    import httpx

    try:
        parts = urllib.parse.urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        plain = not (parts.username or parts.password or parts.query or parts.fragment)
        _ = parts.port
        valid = valid and not any(c.isspace() for c in base_url) and bool(httpx.URL(base_url).host)
    except (AttributeError, TypeError, ValueError, httpx.InvalidURL):
        valid, plain = False, True
    if not plain:
        raise ConfigError(
            "expert base_url holds a user, password, query or fragment; give the plain address "
            "and put the key into api_key_env or api_key_file."
        )
    if not valid:
        raise ConfigError(
            f"expert base_url is {base_url!r}; give an address such as http://127.0.0.1:8000/v1."
        )
    url = str(base_url).rstrip("/")
    if url.endswith(_ENDPOINT):
        raise ConfigError(
            f"expert base_url is {base_url!r}; leave {_ENDPOINT} out, it is added to each request."
        )
    return url
