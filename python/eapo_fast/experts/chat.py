"""The chat-completions wire format: messages out, a reply or a failure back. No I/O here."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from eapo_fast.experts.base import ConsultRequest, ConsultStatus, ExpertReply, Usage
from eapo_fast.experts.secret import scrub_hidden

SYSTEM = (
    "You advise a student who solves a problem alone. Answer the question with a short, "
    "self-contained hint. Do not solve the whole problem."
)
PROMPT = "Problem:\n{problem}\n\nQuestion:\n{query}"

UNFIT = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 407, 410})
"""HTTP statuses of a wrong address, key, account or model: no question would be answered."""

_THINK_TAG = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_QUOTED = 200
_FIELD = re.compile(r"\{(problem|query)\}")


def fill(template: str, request: ConsultRequest) -> str:
    """Put problem and query in their places, in one pass: neither can name the other."""
    values = {"problem": request.problem, "query": request.query}
    return _FIELD.sub(lambda match: values[match.group(1)], template)


def messages(system: str, prompt: str, request: ConsultRequest) -> list[dict[str, str]]:
    """The chat messages of one request."""
    user = {"role": "user", "content": fill(prompt, request)}
    return [{"role": "system", "content": fill(system, request)}, user] if system else [user]


def strip_thinking(text: str) -> str:
    """`text` without thinking blocks: whole, opened in the prompt, or cut before their end.

    One pass, whatever the text: a reply of nothing but tags must not hold the event loop.
    """
    kept: list[str] = []
    start, inside = 0, False
    for tag in _THINK_TAG.finditer(text):
        closes = bool(tag[1])
        if closes and not inside:
            kept.clear()  # it was opened in the prompt
        elif not closes and not inside:
            kept.append(text[start : tag.start()])
        inside = not closes
        start = tag.end()
    return "".join(kept if inside else [*kept, text[start:]]).strip()


def parse_completion(body: bytes, prices: tuple[float, float] | None) -> ExpertReply:
    """The reply in a chat-completions body; a wrong body is `malformed` and worth a retry."""
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        message = choice["message"]
        content = _content(message.get("content"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ExpertReply.failed("malformed", f"no chat completion: {_start(body)}", retry=True)
    usage = _usage(document.get("usage"), prices)
    reason = choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        return ExpertReply.failed("refused", "the model refused", usage=usage)
    text, cut = strip_thinking(content), reason == "length"
    if not text:
        status: ConsultStatus = "too_long" if cut else "malformed"
        return ExpertReply.failed(status, "nothing is left outside the thinking", usage=usage)
    model = document.get("model")
    name = model if isinstance(model, str) else None
    return ExpertReply(text, usage, name, truncated=cut)


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError("content is neither text nor a list of parts")
    return "".join(part["text"] for part in content if part.get("type", "text") == "text")


def _usage(counts: object, prices: tuple[float, float] | None) -> Usage | None:
    if not isinstance(counts, dict):
        return None
    read, written = (_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    if read is None or written is None:
        return None
    return Usage(read, written, price(read, written, prices))


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and isinstance(value, int) and 0 <= value < 2**40 else None


def price(read: int, written: int, prices: tuple[float, float] | None) -> float:
    """Cost at `prices` = (per million tokens read, per million written)."""
    return 0.0 if prices is None else (read * prices[0] + written * prices[1]) / 1e6


def parse_error(status: int, headers: Mapping[str, str], body: bytes) -> ExpertReply:
    """The failure that an HTTP status other than 2xx stands for."""
    detail = f"HTTP {status}: {_start(body)}"
    wait = retry_after(headers.get("retry-after"), _date(headers.get("date")))
    if status in (409, 425, 429):
        return ExpertReply.failed("rate", detail, retry_after=wait, billed=False)
    if status == 408 or status >= 500:
        return ExpertReply.failed("down", detail, retry_after=wait)
    if status == 413:
        return ExpertReply.failed("too_long", detail, billed=False)
    return ExpertReply.failed("refused", detail, billed=False, unfit=status in UNFIT)


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds in a Retry-After header (a number or a date), or None if it says nothing usable.

    A date counts from `now`, which should be the response's own Date: the clock here may be
    another or may jump. None: the clock here.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, time.time() if now is None else now)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _date(value: str | None) -> float | None:
    """The moment of a Date header, in seconds since the epoch."""
    try:
        return None if value is None else email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _seconds_until(date: str, now: float) -> float:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _start(body: bytes) -> str:
    """The beginning of a body; keys go first, or the cut would leave a part of one."""
    return repr(scrub_hidden(body.decode(errors="replace"))[:_QUOTED])


def request_body(chat: list[dict[str, str]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body; options override."""
    return {"messages": chat, "stream": False, **options}
