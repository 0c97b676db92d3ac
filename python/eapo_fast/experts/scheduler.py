"""`ConsultScheduler`: the one desk at which all consults of a run meet."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Self

from eapo_fast.errors import ConfigError, ExpertError
from eapo_fast.experts.base import (
    ConsultHandle,
    ConsultRequest,
    ConsultStatus,
    Expert,
    ExpertReply,
    ReplayMismatch,
)
from eapo_fast.experts.board import Board, logger
from eapo_fast.experts.budget import Budget, Ledger
from eapo_fast.experts.calling import call_expert, run_now
from eapo_fast.experts.checks import is_number
from eapo_fast.experts.dispatch import Dispatcher
from eapo_fast.experts.flights import Consult, Flight
from eapo_fast.experts.gate import gate_accepts, gate_draw
from eapo_fast.experts.kept import KeptReplies
from eapo_fast.experts.policy import ConsultPolicy
from eapo_fast.experts.secret import redact
from eapo_fast.experts.tape import RecordingTape, Tape
from eapo_fast.experts.threads import LoopThread

GRACE = 0.2
"""Seconds after a deadline at which a waiting caller ends a consult that the loop did not."""


class ConsultScheduler:
    """Gates, budgets, merges, batches, sends and times out consults.

    `submit` never blocks; every handle ends with a `ConsultResult`, at the latest at its
    deadline, and nothing an expert does raises here (except `ReplayMismatch` of a strict
    replay). Results are independent of completion order: the gate and the jitter are keyed
    draws. An expert with `immediate=True` is answered on the caller's thread by `flush()`,
    `wait()` or `result()`, without timers. Close it, or use it as a context manager: the
    event-loop thread and all tasks end, and open consults become `cancelled`. A `Ledger` in place
    of a budget is shared: two schedulers then spend the same money.
    """

    def __init__(
        self,
        expert: Expert,
        policy: ConsultPolicy | None = None,
        budget: Budget | Sequence[Budget] | Ledger | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.expert = _checked_expert(expert)
        self.policy = _checked_policy(policy)
        self.ledger = budget if isinstance(budget, Ledger) else Ledger(budget)
        self.seed = seed
        self.immediate = bool(getattr(expert, "immediate", False))
        _check_prices(expert, self.ledger)
        self._board = Board(expert, self.policy, self.ledger)
        self._queue: deque[Flight] = deque()
        self._starting = threading.Lock()
        self._seen = 0
        self._step_end: tuple[int, float] | None = None
        self._parts: Counter[int] = Counter()
        self._closed = self._unflushed = False
        self._thread: LoopThread | None = None
        self._dispatcher: Dispatcher | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def acceptance(self, step: int) -> float:
        """rho(step): the probability that a consult of this step is accepted."""
        return self.policy.acceptance(step)

    def submit(self, request: ConsultRequest) -> ConsultHandle:
        """Ask; returns at once. ExpertError if the scheduler is closed."""
        if self._closed:
            raise ExpertError("this ConsultScheduler is closed; make a new one.")
        consult = self._consult(request)
        self._board.counters.add("asked")
        if not consult.accept and self.policy.gate == "before_dispatch":
            self._board.decline(consult)
            return consult.handle
        flight = self._board.enter(consult)
        if self.immediate and flight is not None:
            self._queue.append(flight)
        elif not self.immediate and not consult.claimed:
            self._unflushed = self._unflushed or flight is not None
            self._call_loop(partial(Dispatcher.admit, consult=consult, flight=flight))
        return consult.handle

    def _consult(self, request: ConsultRequest) -> Consult:
        now = time.monotonic()
        deadline = float("inf") if self.immediate else self._deadline(request.step, now)
        accept = gate_accepts(self.acceptance(request.step), gate_draw(self.seed, request))
        handle = ConsultHandle(request, self._wait_for, self._cancel)
        return Consult(request, handle, now, deadline, accept)

    def _deadline(self, step: int, now: float) -> float:
        """When a consult asked now ends at the latest: its own time, or what the step has left."""
        own, allowed = now + self.policy.timeout, self.policy.step_timeout
        if allowed is None:
            return own
        if self._step_end is None or self._step_end[0] != step:
            self._step_end = step, now + allowed
        return min(own, max(now, self._step_end[1]))

    def skip_parts(self, step: int, count: int) -> None:
        """Count collections of a step that an earlier process made, before the first of this one.

        A recording names each collection by its number, so work that is continued counts on.
        """
        self._parts[step] = count

    def tape(self, step: int) -> Tape:
        """What the clock decides in a collection of rollouts: recorded, replayed, or neither."""
        self._parts[step] += 1
        part = self._parts[step] - 1
        timeline = getattr(self.expert, "timeline", None)
        if timeline is not None:
            replayed: Tape = timeline(step, part)
            return replayed
        recorder = self._board.recorder
        return Tape() if recorder is None else RecordingTape(recorder.write_line, step, part)

    def _call_loop(self, function: Callable[[Dispatcher], None]) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = LoopThread("eapo-consults")
                self._dispatcher = Dispatcher(self._board, self._thread.loop, self.seed)
        self._thread.call(function, self._dispatcher)

    def flush(self) -> None:
        """Nothing more comes this tick: send short batches now; immediate experts answer now."""
        if self.immediate:
            self._answer_queue()
        elif self._unflushed:  # to wake the loop for nothing would cost the caller's thread
            self._unflushed = False
            self._call_loop(Dispatcher.flush)

    def _answer_queue(self) -> None:
        size = max(1, int(self.expert.max_batch_size))
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
            live = [flight for flight in batch if flight.waiters]
            if live:
                self._answer(live)

    def _answer(self, flights: Sequence[Flight]) -> None:
        requests = [flight.request for flight in flights]
        self._board.begin(flights)
        try:
            replies = run_now(call_expert(self.expert, requests))
        except ReplayMismatch:
            raise
        except ExpertError as error:
            replies = [ExpertReply.failed("malformed", str(error))] * len(flights)
        for flight, reply in zip(flights, replies, strict=True):
            self._board.settle(flight, reply)
            self._board.land(flight, reply)

    def wait(self, timeout: float) -> bool:
        """Block until a consult has ended since the last `wait`; False after `timeout` seconds.

        Returns False at once when nothing is under way.
        """
        self._answer_queue()
        end = time.monotonic() + timeout
        board = self._board
        while True:
            with board.changed:
                if board.completed > self._seen:
                    self._seen = board.completed
                    return True
                if not board.outstanding:
                    return False
            if not self._sleep(end):
                return False

    def _wait_for(self, handle: ConsultHandle, timeout: float | None) -> None:
        self._answer_queue()
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not handle.done() and self._sleep(end, handle):
            pass

    def _sleep(self, end: float, handle: ConsultHandle | None = None) -> bool:
        """Sleep until something ends, `end`, or a deadline passes; False once `end` has come."""
        board = self._board
        with board.changed:
            now = time.monotonic()
            if now >= end:
                return False
            fresh = handle.done() if handle else board.completed > self._seen
            if not fresh:
                until = min(end, board.next_deadline() + GRACE)
                board.changed.wait(min(max(0.0, until - now), 3600.0))
        self._quit(board.overdue(time.monotonic(), GRACE), "timeout")
        return True

    def _cancel(self, handle: ConsultHandle) -> None:
        with self._board.changed:
            mine = [one for one in self._board.outstanding if one.handle is handle]
        self._quit(mine, "cancelled")

    def _quit(self, consults: Sequence[Consult], status: ConsultStatus) -> None:
        """End consults, all of them before the work that they leave behind is stopped."""
        ended = [self._board.quit(consult, status) for consult in consults]
        for flight in ended:
            if flight is None:
                continue
            if self.immediate:
                self._board.settle(flight, ExpertReply.failed(status, billed=False))
            else:
                self._call_loop(partial(Dispatcher.reap, flight=flight))

    def expected_wait(self) -> float:
        """Return how many seconds a consult that is asked now will probably take."""
        if self.immediate:
            return 0.0
        return min(self._board.counters.typical_latency(self.policy.timeout), self.policy.timeout)

    def drain_metrics(self) -> dict[str, float]:
        """Counters `expert/...` since the last call; the set of names is fixed."""
        return self._board.counters.drain()

    def probe(self) -> str | None:
        """A problem in words if the expert cannot be reached now; None if all is well."""
        check = getattr(self.expert, "probe", None)
        try:
            problem = check() if check else None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return None if problem is None else redact(str(problem))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint: the budget ledger."""
        return {"version": 1, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; DataError if it is something else."""
        self.ledger.load_state_dict(state.get("ledger", {}))

    def keep_replies(self, path: str | PathLike[str], *, after: int | None) -> None:
        """Keep each accepted reply in a file until `checkpointed`.

        A run that died and goes on after the step `after` then does not buy them again; None: a
        fresh run. Experts in the process and replays need no such file and get none.
        """
        if not self.immediate and not getattr(self.expert, "replays", False):
            self._board.kept = KeptReplies(path, after)

    def checkpointed(self) -> None:
        """The run has a checkpoint of now: nothing of before it will be asked again."""
        if self._board.kept is not None:
            self._board.kept.forget()

    def close(self) -> None:
        """End open consults as `cancelled`, then the tasks, the expert and the thread."""
        if self._closed:
            return
        self._closed = True
        with self._board.changed:
            left = list(self._board.outstanding)
        self._quit(left, "cancelled")
        self._queue.clear()
        if self._thread is not None:
            if not self._thread.stop(self._farewell()):
                logger.warning("the expert's code blocks the event loop; its thread is left behind")
        elif self.immediate:
            self._say_farewell_now()
        self._board.close()

    def _say_farewell_now(self) -> None:
        try:
            run_now(self._farewell())
        except Exception as error:
            logger.warning("the expert could not be closed: %s", redact(f"{error!r}"))

    async def _farewell(self) -> None:
        goodbye = getattr(self.expert, "aclose", None)
        if goodbye is not None:
            await goodbye()


def _checked_expert(expert: Expert) -> Expert:
    if isinstance(expert, type):
        raise ConfigError(f"expert is the class {expert.__name__}; give an instance of it.")
    size = getattr(expert, "max_batch_size", 0)
    if callable(getattr(expert, "answer", None)) and is_number(size) and size >= 1:
        return expert
    raise ConfigError(
        f"expert is {type(expert).__name__}; it needs max_batch_size >= 1 and an async method "
        "answer(requests). Wrap a plain function as experts.Function(fn)."
    )


def _checked_policy(policy: ConsultPolicy | None) -> ConsultPolicy:
    if policy is None or isinstance(policy, ConsultPolicy):
        return policy or ConsultPolicy()
    raise ConfigError(f"policy is {policy!r}; give a ConsultPolicy or None.")


def _check_prices(expert: Expert, ledger: Ledger) -> None:
    if ledger.caps_money and not getattr(expert, "priced", False):
        raise ConfigError(
            "expert_budget caps money, but the expert has no prices; give OpenAICompatible("
            "prices=(per million read, per million written)) or Function(max_cost=...), "
            "or cap consults or tokens."
        )
