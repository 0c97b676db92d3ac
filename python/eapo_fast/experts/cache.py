"""Replies bought once: a canonical key, a store in memory, and one in SQLite (JSON values)."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from os import PathLike, fspath
from pathlib import Path
from typing import Protocol

from eapo_fast.errors import ConfigError
from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage


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
    }


def reply_from_json(stored: object) -> ExpertReply | None:
    """The reply, or None if `stored` is not one (a damaged entry is a miss)."""
    if not isinstance(stored, dict) or not isinstance(stored.get("text"), str):
        return None
    model, truncated = stored.get("model"), stored.get("truncated") is True
    usage = usage_from_json(stored.get("usage"))
    name = model if isinstance(model, str) else None
    return ExpertReply(stored["text"], usage, name, truncated=truncated)


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
    """A cache that lasts as long as its scheduler."""

    def __init__(self) -> None:
        self._replies: dict[str, ExpertReply] = {}

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


def open_cache(where: str | PathLike[str] | None) -> Cache | None:
    """None, the in-memory cache for "memory", or the SQLite cache at a path."""
    if where is None:
        return None
    return MemoryCache() if where == "memory" else SqliteCache(where)
