"""Threads that never outlive their owner's patience: an event-loop thread and a worker pool."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_STOP = None
EXECUTOR_PATIENCE = 1.0
"""Seconds for which the threads that look up names are waited for at the end."""


class LoopThread:
    """An asyncio event loop on a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function(*args)` on the loop soon; a stopped loop ignores it."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def stop(self, farewell: Coroutine[Any, Any, None], patience: float = 5.0) -> bool:
        """Run `farewell`, cancel what is left, end the thread; False if it did not end in time."""
        if self._thread.is_alive():
            self.call(self._begin_stop, farewell)
        else:
            farewell.close()
        self._thread.join(patience)
        if self._thread.is_alive():
            return False
        self.loop.close()
        return True

    def _begin_stop(self, farewell: Coroutine[Any, Any, None]) -> None:
        self._last = self.loop.create_task(self._wind_down(farewell))

    async def _wind_down(self, farewell: Coroutine[Any, Any, None]) -> None:
        me = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        with contextlib.suppress(Exception):
            await farewell
        await self.loop.shutdown_asyncgens()
        with contextlib.suppress(TimeoutError):  # a look-up of a name may hang
            await asyncio.wait_for(self.loop.shutdown_default_executor(), EXECUTOR_PATIENCE)
        self.loop.stop()


class DaemonPool:
    """A thread pool whose hung worker cannot keep the interpreter from exiting.

    Threads are started on demand, up to `max_workers`, and end at `close()`.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self.max_workers = max_workers
        self.name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `function` on a worker; a future cancelled before its turn is never run."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._closed:
                raise RuntimeError(f"the pool {self.name!r} is closed; make a new one.")
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self.max_workers:
                self._start_worker()
        self._jobs.put(job)
        return future

    def _start_worker(self) -> None:
        name = f"{self.name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not _STOP:
            job()
            with self._lock:
                self._idle += 1

    def close(self, patience: float = 1.0) -> bool:
        """End the workers after the jobs queued so far; False if one is still busy then."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._jobs.put(_STOP)
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
