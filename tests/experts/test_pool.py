from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import ModuleType

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
    OpenAICompatible,
    Pool,
    Recorded,
    Usage,
)
from eapo_fast.run_config import build_expert


class Replica:
    """Answers when released; counts what it holds."""

    max_batch_size = 1

    def __init__(self, release: asyncio.Event | None = None) -> None:
        self.open = 0
        self.peak = 0

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.open += len(requests)
        self.peak = max(self.peak, self.open)
        await asyncio.sleep(0.02)
        self.open -= len(requests)
        return [ExpertReply(request.query) for request in requests]


def ask(number: int) -> ConsultRequest:
    return ConsultRequest(f"q{number}", rollout=number)


def test_work_goes_to_the_least_busy_and_the_record_says_to_whom() -> None:
    replicas = {name: Replica() for name in ("a", "b", "c")}
    pool = Pool(replicas)
    with ConsultScheduler(pool, ConsultPolicy(timeout=10.0)) as desk:
        results = [h.result(5.0) for h in [desk.submit(ask(i)) for i in range(30)]]
    assert {r.peak for r in replicas.values()} == {10}
    assert pool.answered == {"a": 10, "b": 10, "c": 10}
    assert {r.trace.expert for r in results} == {"a", "b", "c"}
    assert {r.trace.attempts[-1].expert for r in results} == {"a", "b", "c"}


def test_a_slow_member_gets_less() -> None:
    release = threading.Event()
    slow = Function(lambda request: "slow" if release.wait(5.0) else "")
    pool = Pool({"slow": slow, "quick": Function(lambda request: "quick")})
    policy = ConsultPolicy(timeout=10.0, max_concurrency=4)
    with ConsultScheduler(pool, policy) as desk:
        handles = [desk.submit(ask(i)) for i in range(40)]
        end = time.monotonic() + 5.0
        while pool.answered["quick"] < 30 and time.monotonic() < end:
            time.sleep(0.005)
        assert pool.answered["slow"] == 0
        assert pool.answered["quick"] >= 30
        release.set()
        assert all(h.result(5.0).status == "ok" for h in handles)


def test_a_member_that_is_down_is_left_out() -> None:
    calls = {"bad": 0}

    def bad(request: ConsultRequest) -> str:
        calls["bad"] += 1
        raise ConnectionError("gone")

    pool = Pool({"bad": Function(bad), "good": Function(lambda request: "fine")})
    with ConsultScheduler(pool, ConsultPolicy(timeout=10.0, retries=3)) as desk:
        results = [desk.submit(ask(i)).result(8.0) for i in range(30)]
    assert {r.status for r in results} == {"ok"}
    assert {r.trace.expert for r in results} == {"good"}
    assert calls["bad"] <= 4


def test_a_pool_of_dead_members_is_down_and_costs_nothing() -> None:
    def bad(request: ConsultRequest) -> str:
        raise ConnectionError("gone")

    pool = Pool([Function(bad, max_cost=0.1)])
    policy = ConsultPolicy(timeout=5.0, retries=0, breaker_failures=100)
    with ConsultScheduler(pool, policy, Budget(money=10.0)) as desk:
        statuses = [desk.submit(ask(i)).result(5.0).status for i in range(8)]
        assert set(statuses) == {"down"}
        assert desk.ledger.total().consults == 3


def test_a_member_that_refuses_our_key_does_not_draw_all_work_to_itself(chat: ModuleType) -> None:
    """It answers fastest, so it is always the least busy one."""
    with chat.ChatServer(faults=[chat.status(401)] * 1000) as locked:
        pool = Pool({"locked": OpenAICompatible(locked.url, "m"), "good": Replica()})
        with ConsultScheduler(pool, ConsultPolicy(timeout=10.0), Budget(consults=60)) as desk:
            results = [h.result(8.0) for h in [desk.submit(ask(i)) for i in range(60)]]
            assert desk.ledger.total().consults == 60
    assert {(r.status, r.trace.expert) for r in results} == {("ok", "good")}
    with chat.ChatServer(faults=[chat.status(401)] * 1000) as locked:
        pool = Pool({"locked": OpenAICompatible(locked.url, "m")})
        with ConsultScheduler(pool, ConsultPolicy(timeout=10.0)) as desk:
            results = [desk.submit(ask(i)).result(8.0) for i in range(5)]
    assert [r.status for r in results] == ["refused"] * 3 + ["down"] * 2
    assert "401" in results[-1].detail


class Limited(Replica):
    """Says 429 with a pause."""

    calls = 0

    def __init__(self, pause: float | None, *, billed: bool = False) -> None:
        super().__init__()
        self.pause, self.billed = pause, billed

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.calls += 1
        return [ExpertReply.failed("rate", retry_after=self.pause, billed=self.billed)]


@pytest.mark.parametrize("billed", [False, True])
def test_the_pause_of_one_member_holds_back_nobody_else(billed: bool) -> None:
    limited = Limited(30.0, billed=billed)
    pool = Pool({"limited": limited, "good": Replica()})
    with ConsultScheduler(pool, ConsultPolicy(timeout=10.0)) as desk:
        results = [h.result(8.0) for h in [desk.submit(ask(i)) for i in range(60)]]
    assert {(r.status, r.trace.expert) for r in results} == {("ok", "good")}
    assert max(r.latency for r in results) < 3.0
    assert limited.calls == 1


def test_a_pool_whose_members_all_rest_says_until_when() -> None:
    members = {"long": Limited(30.0), "short": Limited(0.4)}
    with ConsultScheduler(Pool(members), ConsultPolicy(timeout=5.0, retries=1)) as desk:
        start = time.monotonic()
        assert desk.submit(ask(0)).result(8.0).status == "rate"
        assert 0.4 <= time.monotonic() - start < 2.0
    assert [m.calls for m in members.values()] == [1, 2]


def test_bounds_prices_and_identity_are_the_members_together() -> None:
    cheap = Function(lambda r: "x", max_cost=0.1, max_reply_tokens=10, identity="cheap")
    dear = Function(lambda r: "x", max_cost=0.5, max_reply_tokens=5, identity="dear")
    pool = Pool([cheap, dear])
    worst = pool.worst_case(ask(0))
    assert (worst.completion_tokens, worst.cost) == (10, 0.5)
    assert pool.priced
    assert not Pool([cheap, Function(lambda r: "x")]).priced
    assert pool.identity == Pool([dear, cheap]).identity
    assert Pool([Calculator(), Calculator()]).immediate
    assert not Pool([Calculator(), cheap]).immediate


def test_an_immediate_pool_answers_on_the_callers_thread_and_is_recorded(tmp_path) -> None:
    policy = ConsultPolicy(record=tmp_path / "r.jsonl")
    with ConsultScheduler(Pool({"calc": Calculator()}), policy) as desk:
        assert desk.submit(ConsultRequest("48/2")).result().text == "24"
    with ConsultScheduler(Recorded(tmp_path / "r.jsonl")) as desk:
        result = desk.submit(ConsultRequest("48/2")).result()
    assert (result.text, result.trace.expert) == ("24", "calc")


def test_nested_pools_name_the_whole_way() -> None:
    inner = Pool({"b": Function(lambda r: ExpertReply("x", Usage(1, 1)), immediate=True)})
    with ConsultScheduler(Pool({"a": inner})) as desk:
        assert desk.submit(ask(0)).result().trace.expert == "a/b"


def test_pools_come_from_files_and_bad_ones_are_refused() -> None:
    pool = build_expert({"kind": "pool", "experts": {"x": {"kind": "calculator"}}})
    assert isinstance(pool, Pool)
    with pytest.raises(ConfigError, match="empty"):
        Pool([])
    with pytest.raises(ConfigError, match="no expert"):
        Pool([lambda request: "x"])
    with pytest.raises(ConfigError, match="allowed is"):
        build_expert({"kind": "pool", "experts": ["calculator"]})
