"""From the books of a consult to what its caller gets: a result and how it came about."""

from __future__ import annotations

import time

from eapo_fast.experts.base import (
    Attempt,
    ConsultResult,
    ConsultStatus,
    ExpertReply,
    Trace,
    Usage,
)
from eapo_fast.experts.budget import NANO
from eapo_fast.experts.flights import Consult, Flight
from eapo_fast.experts.policy import ConsultPolicy
from eapo_fast.experts.replies import shape
from eapo_fast.experts.secret import redact

MAX_DETAIL = 500


def brief(detail: str) -> str:
    """A reason for the user: without keys, and bounded."""
    return redact(detail)[:MAX_DETAIL]


def attempt_of(flight: Flight, reply: ExpertReply | None, *, timed: bool) -> Attempt:
    """The attempt of `flight` that ends now; None: nothing came back."""
    seconds = start = 0.0
    if timed:
        start, seconds = flight.began - flight.opened, time.monotonic() - flight.began
    lost: ConsultStatus = "timeout" if flight.expired else "cancelled"
    expert = reply.expert if reply else None
    return Attempt(start, seconds, reply.status if reply else lost, expert)


def result_of(
    consult: Consult,
    reply: ExpertReply,
    usage: Usage | None,
    cost: float,
    policy: ConsultPolicy,
    *,
    timed: bool,
) -> ConsultResult:
    """How `consult` ends with `reply`; `usage` and `cost` are what it carries of its flight's."""
    status, text, truncated, transforms, detail = shape(reply, policy)
    if not consult.accept and status != "cancelled":
        status, text, truncated, transforms = "declined", "", False, ()
    waited = consult.flight is not None and consult.deadline < float("inf")
    return ConsultResult(
        status,
        text,
        usage,
        cost,
        time.monotonic() - consult.submitted if waited else 0.0,
        reply.model,
        truncated,
        brief(detail),
        trace_of(consult, reply, transforms, timed=timed),
    )


def trace_of(
    consult: Consult, reply: ExpertReply, transforms: tuple[str, ...], *, timed: bool
) -> Trace:
    """How the result came about."""
    flight = consult.flight
    if flight is None:
        cached = reply.status == "cached"
        source = "cache" if cached else "none"
        return Trace(consult.key, source, expert=reply.expert, transforms=transforms)  # type: ignore[arg-type]
    running = (attempt_of(flight, reply, timed=timed),) if flight.sent else ()
    return Trace(
        consult.key,
        "merged" if consult.merged else "expert",
        (*flight.log, *running),
        flight.held.tokens,
        flight.held.nano / NANO,
        reply.expert,
        transforms,
        reply.unfit,
    )
