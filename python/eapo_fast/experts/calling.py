"""One call of an expert: whatever it does, one well-formed reply per request comes back."""

from __future__ import annotations

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
from eapo_fast.experts.secret import scrub

T = TypeVar("T")
PROMPT_OVERHEAD = 256
"""Tokens allowed for instructions around a query when an expert states no worst case."""


async def call_expert(expert: Expert, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
    """Answer `requests`; exceptions and malformed replies become failures.

    Errors of the operating system and timeouts mean `down` (worth a retry), any other exception
    means `malformed`. Only `ReplayMismatch` is let through.
    """
    try:
        replies = list(await expert.answer(requests))
    except ReplayMismatch:
        raise
    except ExpertFailure as failure:
        replies = [failure.reply] * len(requests)
    except OSError as error:
        replies = [ExpertReply.failed("down", _words(error))] * len(requests)
    except Exception as error:
        replies = [ExpertReply.failed("malformed", _words(error))] * len(requests)
    if len(replies) != len(requests):
        detail = f"{len(replies)} replies to {len(requests)} requests"
        return [ExpertReply.failed("malformed", detail)] * len(requests)
    return [_checked(reply) for reply in replies]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _checked(reply: object) -> ExpertReply:
    if not isinstance(reply, ExpertReply):
        got = type(reply).__name__
        return ExpertReply.failed("malformed", f"the expert returned {got}, not ExpertReply")
    if not isinstance(reply.text, str) or reply.status not in STATUSES:
        detail = f"text is {type(reply.text).__name__}, status is {reply.status!r}"
        return ExpertReply.failed("malformed", detail)
    if reply.usage is not None and not _plausible(reply.usage):
        reply = replace(reply, usage=None)
    return without_secrets(reply)


def _plausible(usage: object) -> bool:
    """Whether a usage can be booked; another one counts as unknown."""
    if not isinstance(usage, Usage):
        return False
    numbers = (usage.prompt_tokens, usage.completion_tokens, usage.cost)
    return all(isinstance(n, int | float) and 0 <= n < 2**53 for n in numbers)


def without_secrets(reply: ExpertReply) -> ExpertReply:
    """`reply` without live keys: a server may echo them, and replies are stored."""
    model = None if reply.model is None else scrub(str(reply.model))
    text = scrub(reply.text)
    same = text == reply.text and model == reply.model
    return reply if same else replace(reply, text=text, model=model)


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
