"""`Function`: a Python callable as an expert."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from types import CodeType

from eapo_fast.errors import ConfigError
from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage
from eapo_fast.experts.calling import PROMPT_OVERHEAD, text_bytes
from eapo_fast.experts.checks import checked_count, checked_number
from eapo_fast.experts.lines import digest
from eapo_fast.experts.threads import DaemonPool

Answer = str | ExpertReply


class Function:
    """Answers with `fn(request) -> str` (or `-> ExpertReply`), sync or async.

    A sync `fn` runs on a pool of `max_workers` threads, or on the caller's thread if
    `immediate=True` (for quick, pure functions: results are then deterministic and need no
    timer). OSError and TimeoutError raised by `fn` mean `down`, other exceptions `malformed`.
    `max_cost` is the most that one call costs; without it money cannot be capped. `identity` names
    what decides the reply in cache keys; None: the function's name and code.
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
        if not callable(fn):
            raise ConfigError(f"fn is {fn!r}; it must be a function of one ConsultRequest.")
        self.fn = fn
        self.immediate = immediate
        self.max_batch_size = 1
        self.max_workers = checked_count("max_workers", max_workers)
        self.max_reply_tokens = checked_count("max_reply_tokens", max_reply_tokens)
        self.max_cost = None if max_cost is None else checked_number("max_cost", max_cost, 0)
        self.identity = identity or f"function:{_name(fn)}{_code(fn)}"
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


def _code(fn: object) -> str:
    """A digest of what a Python function says, so that an edited one is another expert.

    What it reads from elsewhere (a closure, a global, an object) is not in it: where that decides
    the reply and a cache outlives it, give `identity`.
    """
    code = getattr(fn, "__code__", None)
    return "" if code is None else f":{digest(_spelled(code))}"


def _spelled(code: CodeType) -> str:
    parts = [_constant(constant) for constant in code.co_consts]
    return repr((code.co_code, code.co_names, parts))


def _constant(value: object) -> str:
    """The same text in every process: the order of a set is not."""
    if isinstance(value, CodeType):
        return _spelled(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _reply(answer: object) -> ExpertReply:
    if isinstance(answer, ExpertReply):
        return answer
    if isinstance(answer, str):
        return ExpertReply(answer)
    return ExpertReply.failed("malformed", f"the function returned {type(answer).__name__}")
