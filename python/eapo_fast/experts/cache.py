"""Replies bought once: a canonical key, a store in memory, and one in SQLite (JSON values)."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from eapo_fast.errors import ConfigError
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


class SqliteCache:
    """A cache in one SQLite file (write-ahead log), shared by runs; values are JSON."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._lock = threading.Lock()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                fspath(path), check_same_thread=False, isolation_level=None, timeout=5.0
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"expert cache {fspath(path)!r} cannot be opened ({error}); "
                "name a writable SQLite file or drop the setting."
            ) from None

    def get(self, key: str) -> ExpertReply | None:
        """The reply stored under `key`; a damaged entry counts as absent."""
        try:
            with self._lock:
                row = self._db.execute("SELECT value FROM replies WHERE key = ?", (key,)).fetchone()
            return reply_from_json(json.loads(row[0])) if row else None
        except (sqlite3.Error, ValueError):
            return None

    def put(self, key: str, reply: ExpertReply) -> None:
        """Store an accepted reply; sqlite3.Error if the disk refuses."""
        row = (key, json.dumps(reply_to_json(reply)))
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


class Shelf:
    """The replies that one scheduler may give again, by the policy's `dedup` and `cache`.

    `dedup="step"` keeps accepted replies for the step in which they were bought, `"run"` for as
    long as the scheduler lives. `cache` keeps them beyond that. None keeps nothing.
    """

    def __init__(self, policy: ConsultPolicy | None) -> None:
        self._per_step = policy is not None and policy.dedup == "step"
        self._step: int | None = None
        self._lock = threading.Lock()
        keeps = policy is not None and policy.dedup in ("step", "run")
        self._memory = MemoryCache() if keeps else None
        self._lasting = open_cache(policy.cache) if policy is not None else None

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
        """Store an accepted reply; sqlite3.Error if the disk refuses."""
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


def open_cache(where: str | PathLike[str] | None) -> Cache | None:
    """None, the in-memory cache for "memory", or the SQLite cache at a path."""
    if where is None:
        return None
    return MemoryCache() if where == "memory" else SqliteCache(where)
