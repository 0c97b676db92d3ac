"""The cache that outlives a run: one SQLite file (write-ahead log), values are JSON.

Whoever waits for a reply never waits for the disk: a thread of its own writes, in batches, and what
is not written yet is answered from memory. Another process that holds the file locked costs nothing
but the lasting of the replies until it lets go.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from os import PathLike, fspath
from pathlib import Path

from eapo_fast.errors import ConfigError
from eapo_fast.experts.base import ExpertReply
from eapo_fast.experts.cache import reply_from_json, reply_to_json
from eapo_fast.experts.threads import DaemonPool

PATIENCE = 5.0
"""Seconds for which a lock of another process is waited for."""
READER_PATIENCE_MS = 50
"""Milliseconds for which who asks waits for a lock of another process; then it is a miss."""
_SETUP = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
)


class SqliteCache:
    """Shared by runs, also at the same time.

    Args:
        path: the file; made if it is not there.
        report: told, from the writing thread, why replies could not be written; they stay in
            memory and are tried again with the next one and at the end.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self, path: str | PathLike[str], report: Callable[[Exception], None] = lambda _: None
    ) -> None:
        self._path = path
        self._report = report
        self._lock = threading.Lock()
        self._unwritten: dict[str, ExpertReply] = {}
        self._writing = False
        self._pool: DaemonPool | None = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._reader = _opened(path)
            self._reader.execute(f"PRAGMA busy_timeout={READER_PATIENCE_MS}")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"expert cache {fspath(path)!r} cannot be opened ({error}); "
                "name a writable SQLite file or drop the setting."
            ) from None

    def get(self, key: str) -> ExpertReply | None:
        """The reply stored under `key`; a damaged entry counts as absent."""
        query = "SELECT value FROM replies WHERE key = ?"
        try:
            with self._lock:
                if key in self._unwritten:
                    return self._unwritten[key]
                row = self._reader.execute(query, (key,)).fetchone()
            return reply_from_json(json.loads(row[0])) if row else None
        except (sqlite3.Error, ValueError):
            return None

    def put(self, key: str, reply: ExpertReply) -> None:
        """Store an accepted reply soon; it is found at once."""
        with self._lock:
            self._unwritten[key] = reply
            busy, self._writing = self._writing, True
            if self._pool is None:
                self._pool = DaemonPool(1, "eapo-cache")
            if not busy:
                self._pool.submit(self._write)

    def _write(self) -> None:
        """Write until nothing is left or the file refuses."""
        try:
            with contextlib.closing(_opened(self._path)) as writer:
                while batch := self._batch():
                    rows = [(key, json.dumps(reply_to_json(one))) for key, one in batch.items()]
                    writer.execute("BEGIN IMMEDIATE")
                    writer.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows)
                    writer.execute("COMMIT")
                    self._forget(batch)
        except Exception as error:  # whatever the disk has: it is tried again, and nobody waits
            with self._lock:
                self._writing = False
            self._report(error)

    def _batch(self) -> dict[str, ExpertReply]:
        with self._lock:
            self._writing = bool(self._unwritten)
            return dict(self._unwritten)

    def _forget(self, written: dict[str, ExpertReply]) -> None:
        with self._lock:
            for key, reply in written.items():
                if self._unwritten.get(key) is reply:
                    del self._unwritten[key]

    def close(self) -> None:
        """Write what is left, for at most a little longer than `PATIENCE`, and close the file."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and self._unwritten and not self._writing:
                self._writing = True
                pool.submit(self._write)
        if pool is not None:
            pool.close(PATIENCE + 1.0)
        with self._lock:
            self._reader.close()


def _opened(path: str | PathLike[str]) -> sqlite3.Connection:
    """A connection; asks again while others open the same file (SQLite does not wait there)."""
    end = time.monotonic() + PATIENCE
    while True:
        connection = sqlite3.connect(
            fspath(path), check_same_thread=False, isolation_level=None, timeout=PATIENCE
        )
        try:
            for command in _SETUP:
                connection.execute(command)
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" not in str(error) or time.monotonic() >= end:
                raise
            time.sleep(0.02)
        except sqlite3.Error:
            connection.close()
            raise
        else:
            return connection
