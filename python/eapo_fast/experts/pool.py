"""`Pool`: several experts or replicas behind one desk; each call goes to the least busy one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from eapo_fast.errors import ConfigError
from eapo_fast.experts.base import (
    ACCEPTED,
    RETRYABLE,
    ConsultRequest,
    Expert,
    ExpertFailure,
    ExpertReply,
    Usage,
)
from eapo_fast.experts.breaker import Breaker
from eapo_fast.experts.calling import call_expert, worst_case

FAILURES = 3
"""Failures in a row after which a member is left alone for a while."""
PERIOD = 10.0
"""Seconds between single probes of such a member."""
REST = 0.25
"""Seconds for which a member that answers 429 is spared at least, while others can be asked."""
PAUSE_CAP = 120.0
"""Seconds for which one Retry-After spares a member at most."""
DEFAULT_REPLY_TOKENS = 1024
"""Assumed cap of a member that states no worst case."""


class _Member:
    def __init__(self, name: str, expert: Expert) -> None:
        self.name = name
        self.expert = expert
        self.outstanding = 0
        self.answered = 0
        self.breaker = Breaker(FAILURES, PERIOD)
        self.rests_until = 0.0
        self.trouble = ""

    def judge(self, replies: Sequence[ExpertReply]) -> None:
        """Take note of how a call ended."""
        now = time.monotonic()
        if all(reply.status == "down" or reply.unfit for reply in replies):
            self.breaker.failure(now)
        else:
            self.breaker.success()
            self.answered += len(replies)
        pauses = [max(REST, r.retry_after or 0.0) for r in replies if r.status == "rate"]
        if pauses:
            self.rests_until = max(self.rests_until, now + min(PAUSE_CAP, max(pauses)))
        self.trouble = next((r.detail for r in replies if r.status not in ACCEPTED), "")


class Pool:
    """Asks the member with the least outstanding work (ties: the one that answered least).

    Members are named by the keys of a mapping, or "0", "1", ... in a sequence; the name of the one
    that answered is in every record (`ConsultResult.trace.expert`). A member that keeps failing,
    or refuses our key or model, is left out until a probe succeeds; one that answers 429 rests, as
    long as it asks to. What a member surely did nothing with goes to another one at once. If every
    one is left out, the call is `down` and unbilled; if every one rests, `rate`.
    Which member answers depends on the load: use equal replicas, or a recording, where runs must
    repeat. ConfigError for an empty pool or a member that is no expert.
    """

    def __init__(self, experts: Sequence[Expert] | Mapping[str, Expert]) -> None:
        if not isinstance(experts, Mapping | Sequence):
            raise ConfigError(f"Pool got {experts!r}; give a list or a mapping of experts.")
        named = experts if isinstance(experts, Mapping) else dict(enumerate(experts))
        if not named:
            raise ConfigError("Pool is empty; give at least one expert.")
        for name, expert in named.items():
            if isinstance(expert, type) or not callable(getattr(expert, "answer", None)):
                raise ConfigError(f"Pool member {name} is {type(expert).__name__}, no expert.")
        self._members = [_Member(str(name), expert) for name, expert in named.items()]
        self.max_batch_size = min(int(m.expert.max_batch_size) for m in self._members)
        self.immediate = all(getattr(m.expert, "immediate", False) for m in self._members)
        self.priced = all(getattr(m.expert, "priced", False) for m in self._members)

    @property
    def identity(self) -> str:
        """Part of cache keys: the members', whatever their order."""
        kinds = {
            str(getattr(m.expert, "identity", type(m.expert).__qualname__)) for m in self._members
        }
        return json.dumps(["pool", *sorted(kinds)])

    @property
    def answered(self) -> dict[str, int]:
        """Requests that each member has answered."""
        return {member.name: member.answered for member in self._members}

    def worst_case(self, request: ConsultRequest) -> Usage:
        """Bound on one call, whoever answers it."""
        bounds = [worst_case(m.expert, request, DEFAULT_REPLY_TOKENS) for m in self._members]
        return Usage(
            max(bound.prompt_tokens for bound in bounds),
            max(bound.completion_tokens for bound in bounds),
            max(bound.cost for bound in bounds),
        )

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """Hand the whole batch to one member; to another if that one surely did nothing with it."""
        tried: list[_Member] = []
        replies: list[ExpertReply] = []
        while (member := self._choose(tried)) is not None:
            tried.append(member)
            replies = await self._ask(member, requests)
            if not all(_untouched(reply) for reply in replies):
                break
        if not tried:
            raise ExpertFailure(self._none_left())
        return self._named(tried[-1], replies)

    def _named(self, member: _Member, replies: Sequence[ExpertReply]) -> list[ExpertReply]:
        """`replies` with the member's name, and with the pause of the pool, not of one member."""
        pause = self._pause()
        return [
            replace(
                reply,
                expert=_path(member.name, reply.expert),
                retry_after=pause if reply.status == "rate" else reply.retry_after,
            )
            for reply in replies
        ]

    async def _ask(self, member: _Member, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        member.outstanding += len(requests)
        ended = False
        try:
            replies = await call_expert(member.expert, requests)
            ended = True
        finally:
            member.outstanding -= len(requests)
            if not ended:  # cancelled: a hang looks like this, so it counts against the member
                member.breaker.failure(time.monotonic())
        member.judge(replies)
        return replies

    def _choose(self, tried: Sequence[_Member]) -> _Member | None:
        now = time.monotonic()
        for member in sorted(self._members, key=lambda m: (m.outstanding, m.answered)):
            rests = member in tried or member.rests_until > now
            if not rests and member.breaker.allow(now):
                return member
        return None

    def _pause(self) -> float | None:
        """Seconds until a member may be asked again; None if one may be asked now."""
        now = time.monotonic()
        pause = min(
            (m.rests_until for m in self._members if m.breaker.state == "closed"), default=now
        )
        return pause - now if pause > now else None

    def _none_left(self) -> ExpertReply:
        """Why nobody is asked: all rest, or all were left out."""
        reasons = "; ".join(f"{m.name}: {m.trouble}" for m in self._members if m.trouble)
        pause = self._pause()
        if pause is not None:
            detail = f"every member of the pool rests: {reasons}"
            return ExpertReply.failed("rate", detail, retry_after=pause, billed=False)
        return ExpertReply.failed(
            "down", f"every member of the pool is down: {reasons}", billed=False
        )

    def probe(self) -> str | None:
        """What is wrong with the members that cannot be reached; None if all can."""
        problems = []
        for member in self._members:
            check = getattr(member.expert, "probe", None)
            problem = check() if check else None
            if problem:
                problems.append(f"{member.name}: {problem}")
        return "; ".join(problems) or None

    async def aclose(self) -> None:
        """Close every member."""
        for member in self._members:
            goodbye = getattr(member.expert, "aclose", None)
            if goodbye is not None:
                await goodbye()

    def __repr__(self) -> str:
        return f"Pool({', '.join(f'{m.name}={m.expert!r}' for m in self._members)})"


def _untouched(reply: ExpertReply) -> bool:
    """Whether another member may be asked at once: nothing was billed, and it may do better."""
    return not reply.billed and (reply.unfit or reply.status in RETRYABLE)


def _path(name: str, inner: str | None) -> str:
    return name if inner is None else f"{name}/{inner}"
