"""The caller's side of the symbolic workers: start, ask, give up at the deadline, replace."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from eapo_fast.rewards.limits import WALL_SECONDS

START_SECONDS = 60.0
"""Longest wait for a worker to report that it is ready."""
_TEMPLATE = "eapo_fast.rewards.symbolic.template"
_REPLY_BYTES = 1 << 16


class WorkerFailure(Exception):
    """A worker was killed at its deadline or died; the message says which."""


class NoWorkers(WorkerFailure):
    """No worker could be started."""


def child_environment() -> dict[str, str]:
    """Return the environment of a child that imports from the same places as this process."""
    search_path = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(search_path))}


@dataclass(frozen=True, slots=True)
class _Worker:
    channel: socket.socket
    pid: int


class _Template:
    """The process that forks workers, and the socket that orders them."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _TEMPLATE],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**child_environment(), "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C is the caller's
            )

    def order_worker(self) -> socket.socket:
        """Ask for a worker; returns the socket on which it will speak."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.control, [b"fork 0\n"], [theirs.fileno()])
        return ours

    def kill_worker(self, pid: int) -> None:
        self.control.sendall(f"kill {pid}\n".encode())

    def close(self) -> None:
        """End the template, which ends its workers."""
        self.control.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Pool:
    """Workers for one request each, forked ahead of need; safe to use from any thread.

    Args:
        workers: most checks at once; further callers wait for their turn.
        work_seconds: wall time of one check from the moment its worker starts on it. Waiting for a
            turn or for a worker does not count.
    """

    def __init__(self, workers: int = 0, work_seconds: float = WALL_SECONDS) -> None:
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.work_seconds = work_seconds
        self._turn = threading.BoundedSemaphore(self.workers)
        self._lock = threading.Lock()
        self._template: _Template | None = None
        self._ordered: list[socket.socket] = []
        self._sockets: set[socket.socket] = set()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have one request answered by a fresh worker.

        Raises:
            WorkerFailure: The worker was killed at its deadline, died, or could not be started.
        """
        payload = json.dumps(request).encode() + b"\n"
        with self._turn:
            channel = self._ordered_channel()
            try:
                worker = _Worker(channel, _ready(channel))
                return self._ask(worker, payload)
            finally:
                self._forget(channel)

    def close(self) -> None:
        """End every process of the pool; the next `run` starts afresh."""
        with self._lock:
            template, self._template = self._template, None
            self._close_sockets()
        if template is not None:
            template.close()

    def leave_to_parent(self) -> None:
        """Drop what a fork copied from the parent process without touching the processes."""
        if self._template is not None:
            self._template.control.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for channel in self._sockets:
            channel.close()
        self._sockets.clear()
        self._ordered.clear()

    def _ordered_channel(self) -> socket.socket:
        """Take a worker that was ordered before and order the next one."""
        try:
            with self._lock:
                if self._template is not None and self._template.process.poll() is not None:
                    self._template.close()
                    self._template = None
                    self._close_sockets()
                if self._template is None:
                    self._template = _Template()
                while len(self._ordered) < 2:
                    channel = self._template.order_worker()
                    self._sockets.add(channel)
                    self._ordered.append(channel)
                return self._ordered.pop(0)
        except OSError as error:
            raise NoWorkers(f"no symbolic worker could be started ({error})") from error

    def _ask(self, worker: _Worker, payload: bytes) -> dict[str, Any]:
        try:
            worker.channel.sendall(payload)
            return _read_line(worker.channel, self.work_seconds)
        except TimeoutError:
            self._kill(worker.pid)
            raise WorkerFailure("symbolic work exceeds its time limit") from None
        except (OSError, EOFError, ValueError) as error:
            raise WorkerFailure(
                f"the symbolic worker was ended by its CPU or memory limit or died ({error})"
            ) from None

    def _kill(self, pid: int) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._template is not None:
                self._template.kill_worker(pid)

    def _forget(self, channel: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(channel)
        channel.close()


def _ready(channel: socket.socket) -> int:
    """Wait for a worker to say that it is ready; returns its process id."""
    try:
        return int(_read_line(channel, START_SECONDS)["pid"])
    except TimeoutError:
        raise NoWorkers("the symbolic worker does not start") from None
    except (OSError, EOFError, ValueError) as error:
        raise NoWorkers(f"no symbolic worker could be started ({error})") from None


def _read_line(channel: socket.socket, seconds: float) -> dict[str, Any]:
    """Read one JSON line; raises `TimeoutError`, `EOFError` or `ValueError`."""
    deadline = time.monotonic() + seconds
    received = b""
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(left)
        part = channel.recv(_REPLY_BYTES)
        if not part:
            raise EOFError("its channel closed")
        received += part
        if len(received) > _REPLY_BYTES:
            raise ValueError("its reply is too long")
    message = json.loads(received)
    if not isinstance(message, dict):
        raise ValueError("its reply is no object")
    return message


_shared: Pool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> Pool:
    """Return the pool of this process; it starts processes at the first request only."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Pool()
            atexit.register(_shared.close)
        return _shared


def _after_fork() -> None:
    """A forked child has its own pool: the parent's sockets are not its own to use."""
    global _shared, _shared_lock
    inherited, _shared, _shared_lock = _shared, None, threading.Lock()
    if inherited is not None:
        atexit.unregister(inherited.close)
        inherited.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
