"""Replies bought once: a canonical key, a store in memory, and what is kept for how long."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Protocol

from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage

if TYPE_CHECKING:
    from eapo_fast.experts.policy import ConsultPolicy


def request_key(identity: str, request: ConsultRequest) -> str:
    """SHA-256 of what decides the reply: the expert, problem, query and sample index."""
    parts = [identity, request.problem, request.query, request.sample_index]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def reply_to_json(reply: ExpertReply) -> dict[str, object]:
    """The storable part of an accepted reply."""
    usage = reply.usage
    return {
        "text": reply.text,
        "usage": usage and [usage.prompt_tokens, usage.completion_tokens, usage.cost],
        "model": reply.model,
        "truncated": reply.truncated,
        "expert": reply.expert,
    }


def reply_from_json(stored: object) -> ExpertReply | None:
    """The reply, or None if `stored` is not one (a damaged entry is a miss)."""
    if not isinstance(stored, dict) or not isinstance(stored.get("text"), str):
        return None
    model, truncated = stored.get("model"), stored.get("truncated") is True
    usage = usage_from_json(stored.get("usage"))
    return ExpertReply(
        stored["text"],
        usage,
        text_or_none(model),
        truncated=truncated,
        expert=text_or_none(stored.get("expert")),
    )


def text_or_none(value: object) -> str | None:
    """`value` if it is text."""
    return value if isinstance(value, str) else None


def usage_from_json(stored: object) -> Usage | None:
    """A usage from [prompt_tokens, completion_tokens, cost], else None."""
    if not isinstance(stored, list) or len(stored) != 3:
        return None
    if not all(isinstance(value, int | float) and value >= 0 for value in stored):
        return None
    return Usage(int(stored[0]), int(stored[1]), float(stored[2]))


class Cache(Protocol):
    """A store of accepted replies by request key."""

    def get(self, key: str) -> ExpertReply | None:
        """The reply stored under `key`, if any."""

    def put(self, key: str, reply: ExpertReply) -> None:
        """Store an accepted reply."""

    def close(self) -> None:
        """Flush and let go of files."""


class MemoryCache:
    """A cache that lasts as long as its scheduler; `begin` empties it for a new step."""

    def __init__(self) -> None:
        self._replies: dict[str, ExpertReply] = {}

    def begin(self) -> None:
        """Forget everything."""
        self._replies.clear()

    def get(self, key: str) -> ExpertReply | None:
        """The reply stored under `key`, if any."""
        return self._replies.get(key)

    def put(self, key: str, reply: ExpertReply) -> None:
        """Store an accepted reply."""
        self._replies[key] = reply

    def close(self) -> None:
        """Nothing to let go of."""


class Shelf:
    """The replies that one scheduler may give again, by the policy's `dedup` and `cache`.

    `dedup="step"` keeps accepted replies for the step in which they were bought, `"run"` for as
    long as the scheduler lives. `cache` keeps them beyond that. None keeps nothing.
    """

    def __init__(
        self, policy: ConsultPolicy | None, report: Callable[[Exception], None] = lambda _: None
    ) -> None:
        self._per_step = policy is not None and policy.dedup == "step"
        self._step: int | None = None
        self._lock = threading.Lock()
        keeps = policy is not None and policy.dedup in ("step", "run")
        self._memory = MemoryCache() if keeps else None
        self._lasting = open_cache(policy.cache, report) if policy is not None else None

    def get(self, key: str, request: ConsultRequest) -> ExpertReply | None:
        """The stored reply as a `cached` one, if there is one for this request."""
        found = None
        if self._memory is not None:
            with self._lock:
                self._begin(request.step)
                found = self._memory.get(key)
        if found is None and self._lasting is not None:
            found = self._lasting.get(key)
        return None if found is None else replace(found, status="cached", usage=None)

    def put(self, key: str, request: ConsultRequest, reply: ExpertReply) -> None:
        """Store an accepted reply."""
        if self._memory is not None:
            with self._lock:
                if not self._per_step or request.step == self._step:
                    self._memory.put(key, reply)
        if self._lasting is not None:
            self._lasting.put(key, reply)

    def _begin(self, step: int) -> None:
        if self._memory is not None and self._per_step and step != self._step:
            self._memory.begin()
            self._step = step

    def close(self) -> None:
        """Let go of files."""
        if self._lasting is not None:
            self._lasting.close()


def open_cache(
    where: str | PathLike[str] | None, report: Callable[[Exception], None]
) -> Cache | None:
    """None, the in-memory cache for "memory", or the SQLite cache at a path.

    `report` is told, from another thread, why replies could not be written.
    """
    if where is None:
        return None
    from eapo_fast.experts.sqlite_cache import SqliteCache

    return MemoryCache() if where == "memory" else SqliteCache(where, report)
