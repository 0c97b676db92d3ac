"""`Function`: a Python callable as an expert."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence

from eapo_fast.errors import ConfigError
from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage
from eapo_fast.experts.calling import PROMPT_OVERHEAD, text_bytes
from eapo_fast.experts.threads import DaemonPool

Answer = str | ExpertReply


class Function:
    """Answers with `fn(request) -> str` (or `-> ExpertReply`), sync or async.

    A sync `fn` runs on a pool of `max_workers` threads, or on the caller's thread if
    `immediate=True` (for quick, pure functions: results are then deterministic and need no
    timer). OSError and TimeoutError raised by `fn` mean `down`, other exceptions `malformed`.
    `max_cost` is the most that one call costs; without it money cannot be capped.
    """

    def __init__(
        self,
        fn: Callable[[ConsultRequest], Answer | Awaitable[Answer]],
        *,
        immediate: bool = False,
        max_workers: int = 32,
        max_reply_tokens: int = 1024,
        max_cost: float | None = None,
        identity: str | None = None,
    ) -> None:
        self._asynchronous = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
            getattr(fn, "__call__", None)  # noqa: B004
        )
        if immediate and self._asynchronous:
            raise ConfigError("immediate=True needs a sync function; got an async one.")
        if max_workers < 1:
            raise ConfigError(f"max_workers is {max_workers}; it must be 1 or more.")
        self.fn = fn
        self.immediate = immediate
        self.max_batch_size = 1
        self.max_workers = max_workers
        self.max_reply_tokens = max_reply_tokens
        self.max_cost = max_cost
        self.identity = identity or f"function:{_name(fn)}"
        self._pool: DaemonPool | None = None

    @property
    def priced(self) -> bool:
        """Whether money can be capped."""
        return self.max_cost is not None

    def worst_case(self, request: ConsultRequest) -> Usage:
        """Bound on one call."""
        read = text_bytes(request) + PROMPT_OVERHEAD
        return Usage(read, self.max_reply_tokens, self.max_cost or 0.0)

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """Call the function once per request."""
        return [_reply(await self._call(request)) for request in requests]

    async def _call(self, request: ConsultRequest) -> object:
        if self.immediate:
            return self.fn(request)
        if self._asynchronous:
            result = self.fn(request)
        else:
            if self._pool is None:
                self._pool = DaemonPool(self.max_workers, "eapo-function")
            result = await asyncio.wrap_future(self._pool.submit(self.fn, request))
        return await result if inspect.isawaitable(result) else result

    async def aclose(self) -> None:
        """End the worker threads; a later call starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __repr__(self) -> str:
        return f"Function({_name(self.fn)}, immediate={self.immediate})"


def _name(fn: object) -> str:
    kind = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def _reply(answer: object) -> ExpertReply:
    if isinstance(answer, ExpertReply):
        return answer
    if isinstance(answer, str):
        return ExpertReply(answer)
    return ExpertReply.failed("malformed", f"the function returned {type(answer).__name__}")
