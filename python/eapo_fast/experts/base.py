"""The nouns of consulting: a request, a reply, a result, and what an expert has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

from eapo_fast.errors import ExpertError

ConsultStatus = Literal[
    "ok",
    "cached",
    "declined",
    "budget",
    "rate",
    "timeout",
    "down",
    "refused",
    "malformed",
    "too_long",
    "cancelled",
]
"""How a consult can end. `ok` and `cached` carry a reply; each of the others becomes one notice."""

STATUSES: tuple[ConsultStatus, ...] = get_args(ConsultStatus)
"""The closed list of statuses, in the order of their documentation."""

ACCEPTED: frozenset[str] = frozenset({"ok", "cached"})
"""The statuses whose text the policy gets to read."""

RETRYABLE: frozenset[str] = frozenset({"rate", "down"})
"""The failures worth another attempt unless the expert says otherwise."""


@dataclass(frozen=True, slots=True)
class ConsultRequest:
    """One query that the policy wrote, and where in the run it was written."""

    query: str
    """What the policy asks."""
    problem: str = ""
    """The whole problem that the rollout works on."""
    _: KW_ONLY
    step: int = 1
    """Training step, counted from 1: the acceptance schedule reads it."""
    prompt: int = 0
    """Prompt group within the step."""
    rollout: int = 0
    """Rollout within the prompt group."""
    turn: int = 0
    """Turn within the rollout."""
    index: int = 0
    """Query within the turn."""
    sample_index: int = 0
    """Equal requests with different sample indices are different calls, never merged."""

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """(step, prompt, rollout, turn, index): the key of every draw made for this consult."""
        return (self.step, self.prompt, self.rollout, self.turn, self.index)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call used."""

    prompt_tokens: int
    """Tokens read by the expert."""
    completion_tokens: int
    """Tokens written by the expert."""
    cost: float = 0.0
    """Money, in the currency of the budget."""

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class ExpertReply:
    """An expert's answer to one request; `status` other than "ok" makes it a failure."""

    text: str
    """The advice, without the expert's own thinking."""
    usage: Usage | None = None
    """Measured use; None when unknown (a budget then keeps its worst case)."""
    model: str | None = None
    """Model name as the expert reports it."""
    _: KW_ONLY
    status: ConsultStatus = "ok"
    """Outcome of this one request."""
    truncated: bool = False
    """The text was cut at the reply cap."""
    detail: str = ""
    """Reason of a failure, for the user's log only."""
    retry: bool = False
    """Whether another attempt may help."""
    retry_after: float | None = None
    """Seconds that the expert asks to wait before another attempt."""
    billed: bool = True
    """False when the call surely cost nothing (for instance a refused connection)."""
    unfit: bool = False
    """The expert is the reason (its key, its model's name), not the question: a `Pool` asks another
    member."""
    expert: str | None = None
    """Which member of a `Pool` answered."""

    @classmethod
    def failed(
        cls,
        status: ConsultStatus,
        detail: str = "",
        *,
        retry: bool | None = None,
        retry_after: float | None = None,
        billed: bool = True,
        usage: Usage | None = None,
        unfit: bool = False,
    ) -> ExpertReply:
        """A failure as data; `retry=None` means: as usual for this status."""
        again = status in RETRYABLE if retry is None else retry
        return cls(
            "",
            usage,
            status=status,
            detail=detail,
            retry=again,
            retry_after=retry_after,
            billed=billed,
            unfit=unfit,
        )


class ExpertFailure(ExpertError):
    """Raised by an expert when a whole call failed; holds the reply every request gets."""

    def __init__(self, reply: ExpertReply) -> None:
        super().__init__(f"{reply.status}: {reply.detail}")
        self.reply = reply


class ReplayMismatch(ExpertError):
    """A replayed run asked what was never recorded; the one failure that is not data."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call that was made for a consult."""

    start: float
    """Seconds from the submission of the first consult that waited for it."""
    seconds: float
    """How long it took; 0 for immediate experts."""
    status: ConsultStatus
    """How it ended."""
    expert: str | None = None
    """Which member of a `Pool` was asked, when known."""
    hedge: bool = False
    """It ran beside an earlier call that was late."""


@dataclass(frozen=True, slots=True)
class Trace:
    """How a consult came to its result: for the books and the log, never for the policy."""

    key: str = ""
    """SHA-256 of what decides the reply (`cache.request_key`); empty if it was never needed."""
    source: Literal["expert", "merged", "cache", "none"] = "none"
    """A call of its own, another consult's call, a stored reply, or nothing was asked."""
    attempts: tuple[Attempt, ...] = ()
    """The calls made, in the order in which they ended."""
    reserved_tokens: int = 0
    """Most tokens that the budget held for this consult at once."""
    reserved_cost: float = 0.0
    """Most money that the budget held for this consult at once."""
    expert: str | None = None
    """Which member of a `Pool` answered."""
    transforms: tuple[str, ...] = ()
    """What was done to the reply's text: cleaned, cut, redacted, escaped."""
    unfit: bool = False
    """It failed by the expert (key, address, model), not by the question."""


@dataclass(frozen=True, slots=True)
class ConsultResult:
    """How one consult ended."""

    status: ConsultStatus
    """One of `STATUSES`."""
    text: str = ""
    """The reply, cleaned; empty unless `accepted`."""
    usage: Usage | None = None
    """What the call used, when known."""
    cost: float = 0.0
    """Money charged for this consult; 0 for a merged or cached one."""
    latency: float = 0.0
    """Seconds from submission to the end; exactly 0 for immediate experts."""
    model: str | None = None
    """Model name as the expert reported it."""
    truncated: bool = False
    """The reply was cut at its cap."""
    detail: str = ""
    """Reason of a failure with secrets redacted: for the user, never for the policy."""
    trace: Trace = field(default=Trace(), compare=False, repr=False)
    """How it came about."""

    @property
    def accepted(self) -> bool:
        """Whether `text` may be shown to the policy."""
        return self.status in ACCEPTED


class ConsultHandle:
    """The future of one consult; it always ends, at the latest at the consult's deadline."""

    __slots__ = ("_cancel", "_result", "_wait", "request")

    def __init__(
        self,
        request: ConsultRequest,
        wait: Callable[[ConsultHandle, float | None], None],
        cancel: Callable[[ConsultHandle], None],
    ) -> None:
        self.request = request
        self._wait = wait
        self._cancel = cancel
        self._result: ConsultResult | None = None

    def done(self) -> bool:
        """Whether `result()` would return at once."""
        return self._result is not None

    def result(self, timeout: float | None = None) -> ConsultResult:
        """Wait for the end; TimeoutError after `timeout` seconds (the consult goes on)."""
        if self._result is None:
            self._wait(self, timeout)
        if self._result is None:
            raise TimeoutError(f"the consult is not done after {timeout} s; call result() again")
        return self._result

    def cancel(self) -> None:
        """Give up: the status becomes `cancelled` unless the consult has ended already."""
        if self._result is None:
            self._cancel(self)

    def __repr__(self) -> str:
        state = "pending" if self._result is None else self._result.status
        return f"ConsultHandle({state}, place={self.request.place})"


@runtime_checkable
class Expert(Protocol):
    """Anything that answers questions.

    Optional attributes: `immediate` (answers without waiting for anything), `identity` (part of
    the cache key), `replays` (True: no budget, merging or cache), `priced` (True: usage tells
    the cost, so that money can be capped). Optional methods: `probe() -> str | None`,
    `worst_case(request) -> Usage` (bound on one call), `async aclose()`.
    """

    max_batch_size: int
    """Most requests that one call of `answer` takes."""

    async def answer(self, requests: Sequence[ConsultRequest]) -> Sequence[ExpertReply]:
        """One reply per request, in order; raise `ExpertFailure` when the whole call failed."""
        ...
