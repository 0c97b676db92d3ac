"""Reward functions in processes of their own: `rewards.in_process(function)`.

A function that is slow, holds the interpreter or may crash runs beside the trainer. The process
imports the function by name and gets the columns as JSON, so nothing is pickled and the caller's
script is not run again: it works without a `__main__` guard and from a notebook, as long as the
function stands in a module.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.rewards.symbolic.pool import child_environment

_CHILD = "eapo_fast.rewards.process_child"
_HERE_ONLY = ("rollouts", "trainer_state", "log_extra", "log_metric")
"""Keywords that are objects of the trainer's process and are not passed on."""


class ProcessDied(RuntimeError):
    """The process of a reward function ended or overran its time."""


class in_process:
    """Make a reward function that runs in processes of its own.

    It has the name of the function and is awaited with the other asynchronous ones, so several run
    at once. It gets every column but `rollouts`, `trainer_state`, `log_extra` and `log_metric`.

    Args:
        function: A function of a module, sync or async, in TRL's form.
        workers: Processes; calls beyond that wait.
        timeout: Seconds for one call once a process has it; None: no limit. A process that
            overruns is killed and replaced.

    Raises:
        ConfigError: The function cannot be imported by name, or `workers` is below 1.
    """

    def __init__(
        self, function: Callable[..., Any], *, workers: int = 1, timeout: float | None = None
    ) -> None:
        module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        if module in ("", "__main__") or not name.isidentifier():
            raise ConfigError(
                f"in_process: got {name or function!r} of {module or 'no module'}, allowed is a "
                "function at the top of a module; move it to a file that can be imported"
            )
        if workers < 1:
            raise ConfigError(f"in_process: workers got {workers}, allowed is 1 or more")
        self.__name__ = name
        self.workers = workers
        """Calls at once, which the scorer asks for."""
        self.timeout = timeout
        self._target = f"{module}:{name}"
        self._turn = threading.BoundedSemaphore(workers)
        self._idle: list[_Child] = []
        self._owner = os.getpid()
        atexit.register(self.close)

    async def __call__(self, **keywords: Any) -> list[float | None]:
        """Return one value per completion.

        Raises:
            DataError: A column is no JSON.
            ProcessDied: The process ended or overran its time.
            RuntimeError: The function raised; the message says what.
        """
        import asyncio  # late: a checker's worker has no use for it

        sent = {key: value for key, value in keywords.items() if key not in _HERE_ONLY}
        return await asyncio.to_thread(self._ask, _encoded(sent))

    def close(self) -> None:
        """End the processes; a later call starts others."""
        while self._idle:
            child = self._idle.pop()
            if self._owner == os.getpid():
                child.end()

    def _ask(self, request: bytes) -> list[float | None]:
        with self._turn:
            child = self._taken()
            try:
                reply = child.ask(request, self.timeout)
            except BaseException:
                child.end()
                raise
            self._idle.append(child)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        values: list[float | None] = reply["values"]
        return values

    def _taken(self) -> _Child:
        if self._owner != os.getpid():  # a forked process has no claim to its parent's children
            self._owner = os.getpid()
            self._idle.clear()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return _Child(self._target)


class _Child:
    def __init__(self, target: str) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _CHILD, target],
                stdin=theirs.fileno(),
                env=child_environment(),
                start_new_session=True,
            )
        self.started = False

    def ask(self, request: bytes, timeout: float | None) -> dict[str, Any]:
        try:
            with self.channel.makefile("rb") as lines:
                if not self.started:
                    self.started = lines.readline() == b"ready\n"
                self.channel.settimeout(timeout)
                self.channel.sendall(request)
                line = lines.readline()
                self.channel.settimeout(None)
        except TimeoutError:
            raise ProcessDied(f"its process overran {timeout} s and was ended") from None
        except OSError as error:
            raise ProcessDied(f"its process ended ({error})") from None
        if not line:
            raise ProcessDied("its process ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def end(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


def _encoded(keywords: dict[str, Any]) -> bytes:
    parts = []
    for key, value in keywords.items():
        try:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
        except (TypeError, ValueError) as error:
            raise DataError(f"column {key!r} cannot go to another process: {error}") from error
    return f"{{{', '.join(parts)}}}\n".encode()
