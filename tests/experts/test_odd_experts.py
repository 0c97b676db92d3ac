"""Experts of the user's own that misbehave in Python: everything is an outcome, at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import (
    Budget,
    Calculator,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    ExpertReply,
    Function,
    Pool,
    Usage,
)

POLICY = ConsultPolicy(timeout=30.0, retries=0)


def raiser(error: BaseException) -> Callable[[ConsultRequest], str]:
    def fn(request: ConsultRequest) -> str:
        raise error

    return fn


def coroutine_raiser(error: BaseException) -> Callable[[ConsultRequest], Any]:
    async def fn(request: ConsultRequest) -> str:
        raise error

    return fn


@pytest.mark.parametrize("make", [raiser, coroutine_raiser])
@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        BaseException("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_expert_cannot_end_the_loop_or_leave_a_consult_waiting(make: Any, error: Any) -> None:
    expert = Function(make(error))
    with ConsultScheduler(expert, POLICY, Budget(consults=5)) as desk:
        for number in range(2):
            result = desk.submit(ConsultRequest(f"q{number}")).result(5.0)
            assert (result.status, type(error).__name__ in result.detail) == ("malformed", True)
        assert not any(any(a.reserved) for a in desk.ledger._accounts.values())
        assert desk._thread is not None
        assert desk._thread._thread.is_alive()


def test_an_immediate_expert_cannot_end_the_process_but_the_user_can() -> None:
    for error in (SystemExit(3), asyncio.CancelledError(), BaseException("odd")):
        with ConsultScheduler(Function(raiser(error), immediate=True), POLICY) as desk:
            assert desk.submit(ConsultRequest("q")).result().status == "malformed"
    interrupted = Function(raiser(KeyboardInterrupt()), immediate=True)
    with ConsultScheduler(interrupted, POLICY) as desk, pytest.raises(KeyboardInterrupt):
        desk.submit(ConsultRequest("q")).result()


ODD_REPLIES: dict[str, tuple[Any, str]] = {
    "detail": (ExpertReply("x", detail=5), "ok"),  # type: ignore[arg-type]
    "no detail": (ExpertReply.failed("refused", None), "refused"),  # type: ignore[arg-type]
    "truncated": (ExpertReply("x", truncated="yes"), "ok"),  # type: ignore[arg-type]
    "model": (ExpertReply("x", model=object()), "ok"),  # type: ignore[arg-type]
    "expert": (ExpertReply("x", expert=7), "ok"),  # type: ignore[arg-type]
    "pause in words": (
        ExpertReply.failed("rate", retry_after="soon"),  # type: ignore[arg-type]
        "rate",
    ),
    "no pause": (ExpertReply.failed("rate", retry_after=float("nan")), "rate"),
    "endless pause": (ExpertReply.failed("rate", retry_after=float("inf")), "rate"),
    "usage in halves": (ExpertReply("x", Usage(1.5, 2)), "ok"),  # type: ignore[arg-type]
    "status": (ExpertReply("x", status=["ok"]), "malformed"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("name", ODD_REPLIES)
def test_a_reply_with_fields_of_wrong_types_is_an_outcome(name: str, immediate: bool) -> None:
    reply, status = ODD_REPLIES[name]
    expert = Function(lambda request: reply, immediate=immediate)
    with ConsultScheduler(expert, POLICY, Budget(tokens=10_000)) as desk:
        for number in range(2):  # the second one shows that the first did no harm
            result = desk.submit(ConsultRequest(f"q{number}")).result(5.0)
            assert result.status == status
            assert isinstance(result.detail, str)
        assert desk.drain_metrics()[f"expert/{status}"] == 2


def test_a_fault_of_ours_in_a_result_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("eapo_fast.experts.results.trace_of", broken)
    for immediate in (True, False):
        expert = Function(lambda request: "x", immediate=immediate)
        with ConsultScheduler(expert, ConsultPolicy(timeout=2.0)) as desk:
            result = desk.submit(ConsultRequest("q")).result(9.0)
        assert (result.status, "ZeroDivisionError" in result.detail) == ("malformed", True)


def test_an_expert_that_cannot_be_closed_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    class Sticky(Calculator):
        async def aclose(self) -> None:
            raise RuntimeError("stuck")

    with ConsultScheduler(Sticky()) as desk:
        assert desk.submit(ConsultRequest("1+1")).result().text == "2"
    assert "stuck" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: Function(42),  # type: ignore[arg-type]
        lambda: Function(str, max_cost=-1.0),  # type: ignore[arg-type]
        lambda: Function(str, max_cost=float("nan")),  # type: ignore[arg-type]
        lambda: Function(str, max_reply_tokens=0),  # type: ignore[arg-type]
        lambda: Pool(Calculator()),  # type: ignore[arg-type]
        lambda: Pool([Calculator]),  # type: ignore[list-item]
        lambda: ConsultScheduler(Calculator),  # type: ignore[arg-type]
        lambda: ConsultScheduler(Calculator(), {"timeout": 1.0}),  # type: ignore[arg-type]
        lambda: ConsultScheduler(Calculator(), budget=5),  # type: ignore[arg-type]
        lambda: ConsultScheduler(Calculator(), budget=[5]),  # type: ignore[list-item]
        lambda: ConsultPolicy(timeout="5"),  # type: ignore[arg-type]
        lambda: ConsultPolicy(max_concurrency="4"),  # type: ignore[arg-type]
        lambda: ConsultPolicy(max_concurrency=1.5),  # type: ignore[arg-type]
        lambda: ConsultPolicy(max_wait=float("inf")),
        lambda: Budget(consults="3"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_another_function_is_another_expert_in_the_cache() -> None:
    one, same, other = (
        Function(lambda request: "a"),
        Function(lambda request: "a"),
        Function(lambda request: "b"),
    )
    assert one.identity == same.identity != other.identity
    assert Function(lambda request: "a", identity="mine").identity == "mine"
