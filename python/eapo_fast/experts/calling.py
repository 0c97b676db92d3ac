"""One call of an expert: whatever it does, one well-formed reply per request comes back."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from eapo_fast.errors import ExpertError
from eapo_fast.experts.base import (
    STATUSES,
    ConsultRequest,
    Expert,
    ExpertFailure,
    ExpertReply,
    ReplayMismatch,
    Usage,
)
from eapo_fast.experts.secret import scrub_hidden

T = TypeVar("T")
PROMPT_OVERHEAD = 256
"""Tokens allowed for instructions around a query when an expert states no worst case."""


async def call_expert(expert: Expert, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
    """Answer `requests`; exceptions and malformed replies become failures.

    Errors of the operating system and timeouts mean `down` (worth a retry), any other exception
    means `malformed`, an attempt to end the process or the task included: an expert's
    `SystemExit` would end the event loop of everybody. Let through are `ReplayMismatch`, a
    cancellation by the caller, and an interrupt on the main thread.
    """
    try:
        replies = list(await expert.answer(requests))
    except ReplayMismatch:
        raise
    except ExpertFailure as failure:
        replies = [failure.reply] * len(requests)
    except OSError as error:
        replies = [ExpertReply.failed("down", _words(error))] * len(requests)
    except BaseException as error:
        if _is_the_callers(error):
            raise
        replies = [ExpertReply.failed("malformed", _words(error))] * len(requests)
    if len(replies) != len(requests):
        detail = f"{len(replies)} replies to {len(requests)} requests"
        return [ExpertReply.failed("malformed", detail)] * len(requests)
    return [_checked(reply) for reply in replies]


def _is_the_callers(error: BaseException) -> bool:
    """Whether an exception came from outside: the expert did not raise it by itself."""
    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is threading.main_thread()
    if not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # an immediate expert: nobody can cancel it
        return False
    return task is not None and task.cancelling() > 0


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _checked(reply: object) -> ExpertReply:
    """`reply` with every field of its declared type, so that nothing behind this can trip."""
    if not isinstance(reply, ExpertReply):
        got = type(reply).__name__
        return ExpertReply.failed("malformed", f"the expert returned {got}, not ExpertReply")
    if not isinstance(reply.text, str) or reply.status not in STATUSES:
        detail = f"text is {type(reply.text).__name__}, status is {reply.status!r}"
        return ExpertReply.failed("malformed", detail)
    return without_secrets(reply if _well_typed(reply) else _retyped(reply))


def _well_typed(reply: ExpertReply) -> bool:
    texts = (reply.model, reply.expert)
    flags = (reply.truncated, reply.retry, reply.billed, reply.unfit)
    return (
        (reply.usage is None or _plausible(reply.usage))
        and all(text is None or isinstance(text, str) for text in texts)
        and isinstance(reply.detail, str)
        and all(isinstance(f, bool) for f in flags)
        and (reply.retry_after is None or _seconds(reply.retry_after) == reply.retry_after)
    )


def _retyped(reply: ExpertReply) -> ExpertReply:
    return replace(
        reply,
        usage=reply.usage if _plausible(reply.usage) else None,
        model=None if reply.model is None else str(reply.model),
        truncated=bool(reply.truncated),
        detail=str(reply.detail),
        retry=bool(reply.retry),
        retry_after=_seconds(reply.retry_after),
        billed=bool(reply.billed),
        unfit=bool(reply.unfit),
        expert=None if reply.expert is None else str(reply.expert),
    )


def _seconds(value: object) -> float | None:
    """A pause that can be waited for, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return max(0.0, float(value)) if math.isfinite(value) else None


def _plausible(usage: object) -> bool:
    """Whether a usage can be booked; another one counts as unknown."""
    if not isinstance(usage, Usage):
        return False
    counts = (usage.prompt_tokens, usage.completion_tokens)
    whole = all(isinstance(n, int) and 0 <= n < 2**53 for n in counts)
    return whole and isinstance(usage.cost, int | float) and 0 <= usage.cost < 2**53


def without_secrets(reply: ExpertReply) -> ExpertReply:
    """`reply` without live keys: a server may echo them, and replies are stored."""
    text, model = scrub_hidden(reply.text), reply.model and scrub_hidden(reply.model)
    expert = reply.expert and scrub_hidden(reply.expert)
    same = (text, model, expert) == (reply.text, reply.model, reply.expert)
    return reply if same else replace(reply, text=text, model=model, expert=expert)


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits; ExpertError if it does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise ExpertError(
        "an expert with immediate=True waited for something; set immediate=False or don't await."
    )


def worst_case(expert: Expert, request: ConsultRequest, max_reply_tokens: int) -> Usage:
    """Upper bound on one call: the expert's own, else UTF-8 bytes plus the reply cap."""
    own = getattr(expert, "worst_case", None)
    if own is not None:
        bound: Usage = own(request)
        return bound
    return Usage(text_bytes(request) + PROMPT_OVERHEAD, max_reply_tokens)


def text_bytes(request: ConsultRequest) -> int:
    """UTF-8 bytes of the request: at least its tokens for every byte-level tokenizer."""
    return len(f"{request.problem}{request.query}".encode(errors="replace"))
