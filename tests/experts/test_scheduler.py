from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from types import ModuleType

import pytest

from eapo_fast.errors import ConfigError, ExpertError
from eapo_fast.experts import (
    STATUSES,
    Budget,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    ExpertFailure,
    ExpertReply,
    Function,
    OpenAICompatible,
    Usage,
)

PATIENT = ConsultPolicy(timeout=10.0)


def ask(number: int = 0, **place: int) -> ConsultRequest:
    return ConsultRequest(f"q{number}", "a problem", **place)


class Batches:
    """Records the sizes of its batches."""

    def __init__(self, size: int) -> None:
        self.max_batch_size = size
        self.sizes: list[int] = []

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.sizes.append(len(requests))
        return [ExpertReply(request.query.upper()) for request in requests]


class Flaky:
    """Fails with the scripted replies first, then answers."""

    max_batch_size = 1

    def __init__(self, *failures: ExpertReply | Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.calls += 1
        await asyncio.sleep(0)
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return [failure]
        return [ExpertReply("recovered", Usage(2, 1))]


class Silent:
    """Never answers; counts who is still being served."""

    max_batch_size = 1

    def __init__(self) -> None:
        self.open = 0

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.open += 1
        try:
            await asyncio.sleep(3600)
        finally:
            self.open -= 1
        return []


def test_batches_fill_by_size_by_flush_and_by_age() -> None:
    expert = Batches(4)
    with ConsultScheduler(expert, ConsultPolicy(max_wait=30.0, timeout=60.0)) as desk:
        handles = [desk.submit(ask(i)) for i in range(10)]
        assert [handle.result(5.0).text for handle in handles[:8]] == [f"Q{i}" for i in range(8)]
        assert not handles[9].done()
        desk.flush()
        assert handles[9].result(5.0).text == "Q9"
    assert expert.sizes == [4, 4, 2]
    aged = Batches(4)
    with ConsultScheduler(aged, ConsultPolicy(max_wait=0.02)) as desk:
        assert desk.submit(ask()).result(5.0).status == "ok"
    assert aged.sizes == [1]


def test_concurrency_is_bounded() -> None:
    running, peak = 0, 0

    async def slow(request: ConsultRequest) -> str:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002)
        running -= 1
        return "r"

    with ConsultScheduler(Function(slow), ConsultPolicy(max_concurrency=7)) as desk:
        handles = [desk.submit(ask(i)) for i in range(60)]
        assert {handle.result(5.0).status for handle in handles} == {"ok"}
    assert peak == 7


@pytest.mark.parametrize(
    ("dedup", "distinct", "calls"),
    [
        ("in_flight", False, 1),
        ("in_flight", True, 16),
        ("off", False, 16),
    ],
)
def test_equal_requests_share_one_call(dedup: str, distinct: bool, calls: int) -> None:
    gate = threading.Event()

    def fn(request: ConsultRequest) -> ExpertReply:
        gate.wait(5.0)
        return ExpertReply("same", Usage(5, 5, 0.5))

    policy = ConsultPolicy(dedup=dedup)
    with ConsultScheduler(Function(fn, max_cost=1.0), policy, Budget(money=100.0)) as desk:
        handles = [desk.submit(ask(rollout=i, sample_index=i * distinct)) for i in range(16)]
        gate.set()
        results = [handle.result(5.0) for handle in handles]
        metrics = desk.drain_metrics()
    assert {result.text for result in results} == {"same"}
    assert metrics["expert/sent"] == calls
    assert metrics["expert/merged"] == 16 - calls
    assert sum(result.cost for result in results) == pytest.approx(calls * 0.5)


def test_waiters_outlive_their_leader() -> None:
    release = asyncio.Event()

    async def slow(request: ConsultRequest) -> str:
        await release.wait()
        return "late but true"

    with ConsultScheduler(Function(slow), ConsultPolicy(timeout=0.4)) as desk:
        leader = desk.submit(ask(rollout=0))
        cancelled = desk.submit(ask(rollout=1))
        time.sleep(0.25)
        waiter = desk.submit(ask(rollout=2))
        cancelled.cancel()
        assert cancelled.result(0.0).status == "cancelled"
        assert leader.result(5.0).status == "timeout"
        desk._thread.call(release.set)
        assert waiter.result(5.0).text == "late but true"
        metrics = desk.drain_metrics()
    assert metrics["expert/sent"] == 1


def test_a_failed_leader_leaves_later_waiters_their_own_retries() -> None:
    down = ExpertReply.failed("down", "gone")
    expert = Flaky(down, down, down)
    with ConsultScheduler(expert, ConsultPolicy(retries=1, timeout=10.0)) as desk:
        leader = desk.submit(ask(rollout=0))
        while expert.calls < 1:
            time.sleep(0.001)
        waiter = desk.submit(ask(rollout=1))
        assert leader.result(5.0).status == "down"
        assert waiter.result(5.0).status in ("ok", "down")
    assert expert.calls >= 2


@pytest.mark.parametrize("stuck", ["awaiting", "thread", "loop"])
def test_an_expert_that_never_answers_cannot_hold_a_rollout(stuck: str) -> None:
    """A pause of the machine may stretch one attempt, so the quickest of three counts."""
    spent = [_seconds_until_all_are_back(stuck)]
    while min(spent) >= 0.3 + 0.25 + 0.2 and len(spent) < 3:
        spent.append(_seconds_until_all_are_back(stuck))
    assert min(spent) < 0.3 + 0.25 + 0.2


def _seconds_until_all_are_back(stuck: str) -> float:
    release = threading.Event()

    async def blocks_the_loop(request: ConsultRequest) -> str:
        release.wait(3.0)
        return "too late"

    expert = {
        "awaiting": Silent(),
        "thread": Function(lambda request: "too late" if release.wait(3.0) else ""),
        "loop": Function(blocks_the_loop),
    }[stuck]
    policy = ConsultPolicy(timeout=0.3, max_concurrency=16)
    with ConsultScheduler(expert, policy) as desk:
        start = time.monotonic()
        handles = [desk.submit(ask(i)) for i in range(256)]
        results = [handle.result(5.0) for handle in handles]
        spent = time.monotonic() - start
        statuses = [result.status for result in results]
        assert set(statuses) <= {"timeout", "down"}
        assert statuses.count("timeout") >= 16
        release.set()
    assert not isinstance(expert, Silent) or expert.open == 0
    assert [handle.result().status for handle in handles] == statuses
    return spent


def test_retries_stay_inside_the_deadline_and_are_counted() -> None:
    expert = Flaky(ExpertReply.failed("down"), OSError("reset"))
    with ConsultScheduler(expert, PATIENT) as desk:
        assert desk.submit(ask()).result(5.0).text == "recovered"
        metrics = desk.drain_metrics()
    assert (expert.calls, metrics["expert/retries"], metrics["expert/sent"]) == (3, 2, 3)
    hopeless = Flaky(ExpertReply.failed("rate", retry_after=30.0))
    with ConsultScheduler(hopeless, ConsultPolicy(timeout=5.0)) as desk:
        start = time.monotonic()
        assert desk.submit(ask(1)).result(5.0).status == "rate"
        assert desk.submit(ask(2)).result(5.0).status == "rate"
        assert time.monotonic() - start < 1.0
    assert hopeless.calls == 1


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (ExpertReply.failed("refused", "no"), "refused"),
        (ExpertReply.failed("too_long"), "too_long"),
        (ExpertFailure(ExpertReply.failed("malformed", "x")), "malformed"),
        (ZeroDivisionError("1/0"), "malformed"),
        (ExpertReply(" \x00 "), "malformed"),
        (ExpertReply(17), "malformed"),
        ("not a reply", "malformed"),
    ],
    ids=str,
)
def test_final_failures_are_data_and_are_not_retried(failure: object, status: str) -> None:
    expert = Flaky(failure)
    with ConsultScheduler(expert, PATIENT) as desk:
        result = desk.submit(ask()).result(5.0)
    assert (result.status, result.text, expert.calls) == (status, "", 1)


def test_wrong_number_of_replies_is_malformed() -> None:
    class Forgetful(Batches):
        async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
            return []

    with ConsultScheduler(Forgetful(2)) as desk:
        handles = [desk.submit(ask(i)) for i in range(4)]
        assert {handle.result(5.0).status for handle in handles} == {"malformed"}


def test_the_breaker_leaves_a_dead_expert_alone_and_recovers() -> None:
    down = ExpertReply.failed("down", retry=False)
    expert = Flaky(*[down] * 4)
    policy = ConsultPolicy(breaker_failures=3, breaker_period=0.3)
    with ConsultScheduler(expert, policy) as desk:
        for i in range(50):
            assert desk.submit(ask(i)).result(5.0).status == "down"
        assert expert.calls == 3
        time.sleep(0.32)
        probes = [desk.submit(ask(100 + i)) for i in range(20)]
        assert {handle.result(5.0).status for handle in probes} == {"down"}
        assert expert.calls == 4
        time.sleep(0.32)
        assert desk.submit(ask(200)).result(5.0).status == "ok"
        assert desk.submit(ask(201)).result(5.0).status == "ok"
        assert desk.drain_metrics()["expert/blocked_by_breaker"] == 47 + 19


def test_exception_text_reaches_the_log_but_not_the_policy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    expert = Flaky(ValueError("internal path /secret/place"))
    with caplog.at_level(logging.WARNING), ConsultScheduler(expert) as desk:
        result = desk.submit(ask()).result(5.0)
    assert "internal path" not in result.text
    assert "internal path" in result.detail
    assert "internal path" in caplog.text


def test_close_cancels_what_is_open_and_ends_everything() -> None:
    expert = Silent()
    desk = ConsultScheduler(expert, ConsultPolicy(timeout=60.0), Budget(consults=100))
    handles = [desk.submit(ask(i)) for i in range(80)]
    while expert.open < 64:
        time.sleep(0.005)
    desk.close()
    desk.close()
    assert {handle.result(0.0).status for handle in handles} == {"cancelled"}
    assert expert.open == 0
    assert desk.ledger.total().consults == 64
    with pytest.raises(ExpertError, match="closed"):
        desk.submit(ask())


def test_a_consult_cancelled_in_the_tick_of_its_dispatch_gives_its_money_back() -> None:
    with ConsultScheduler(Silent(), PATIENT, Budget(consults=10)) as desk:
        desk.submit(ask(0))
        held, both = threading.Event(), threading.Event()
        desk._thread.call(held.wait, 5.0)
        desk.submit(ask(1)).cancel()
        desk._thread.call(both.set)
        held.set()
        assert both.wait(5.0)
        time.sleep(0.05)
        assert desk.ledger.total().consults == 1


def test_an_experts_own_worst_case_that_raises_is_an_outcome() -> None:
    class Odd(Batches):
        def worst_case(self, request: ConsultRequest) -> Usage:
            raise KeyError("price list")

    with ConsultScheduler(Odd(1), PATIENT, Budget(consults=10)) as desk:
        result = desk.submit(ask()).result(5.0)
    assert (result.status, "price list" in result.detail) == ("malformed", True)


@pytest.mark.parametrize(
    "usage", [Usage(-5, 1), Usage(1, 1, float("nan")), Usage(1, 1, float("inf")), "many"]
)
def test_an_impossible_usage_counts_as_unknown(usage: object) -> None:
    expert = Function(lambda r: ExpertReply("x", usage), max_cost=0.5, max_reply_tokens=7)  # type: ignore[arg-type]
    with ConsultScheduler(expert, PATIENT, Budget(money=10.0)) as desk:
        assert desk.submit(ask()).result(5.0).status == "ok"
        total = desk.ledger.total()
    assert (total.nano, total.tokens > 7) == (500_000_000, True)


@pytest.mark.parametrize(
    ("dedup", "calls"), [("off", 6), ("in_flight", 6), ("step", 3), ("run", 2)]
)
def test_how_long_replies_are_shared(dedup: str, calls: int) -> None:
    """Two queries asked in step 1, one of them in steps 1 and 2 again; all one after another."""
    asked: list[str] = []
    expert = Function(lambda r: asked.append(r.query) or "r", immediate=True)
    with ConsultScheduler(expert, ConsultPolicy(dedup=dedup)) as desk:  # type: ignore[arg-type]
        places = [(0, 1), (0, 1), (1, 1), (1, 1), (1, 2), (1, 2)]
        statuses = [desk.submit(ask(n, step=step)).result().status for n, step in places]
        metrics = desk.drain_metrics()
    assert len(asked) == calls
    assert statuses.count("cached") == 6 - calls == metrics["expert/cached"]
    assert metrics["expert/shared_share"] == (6 - calls) / 6


def test_deliberate_repeats_are_kept_apart_in_every_mode() -> None:
    asked: list[int] = []
    expert = Function(lambda r: asked.append(r.sample_index) or str(r.sample_index), immediate=True)
    with ConsultScheduler(expert, ConsultPolicy(dedup="run")) as desk:
        texts = [desk.submit(ask(0, sample_index=i % 3)).result().text for i in range(9)]
    assert texts == ["0", "1", "2"] * 3
    assert asked == [0, 1, 2]


def test_retries_are_counted_by_kind() -> None:
    rate, down = ExpertReply.failed("rate", retry_after=0.0), ExpertReply.failed("down")
    expert = Flaky(*[rate] * 3, down)
    policy = ConsultPolicy(timeout=30.0, retries={"rate": 3, "down": 1})
    with ConsultScheduler(expert, policy) as desk:
        result = desk.submit(ask()).result(20.0)
    assert (result.status, expert.calls) == ("ok", 5)
    assert [a.status for a in result.trace.attempts] == ["rate"] * 3 + ["down", "ok"]
    expert = Flaky(*[down] * 2)
    with ConsultScheduler(expert, policy) as desk:
        assert desk.submit(ask()).result(20.0).status == "down"
    with pytest.raises(ConfigError, match="retries"):
        ConsultPolicy(retries={"rate": -1})
    with pytest.raises(ConfigError, match="allowed"):
        ConsultPolicy(retries={"rates": 1})


def test_a_step_ends_for_all_its_consults_at_once() -> None:
    policy = ConsultPolicy(timeout=10.0, step_timeout=0.3)
    with ConsultScheduler(Silent(), policy) as desk:
        start = time.monotonic()
        first = desk.submit(ask(0, step=1))
        time.sleep(0.2)
        second = desk.submit(ask(1, step=1))
        assert (first.result(5.0).status, second.result(5.0).status) == ("timeout", "timeout")
        assert time.monotonic() - start < 0.3 + 0.5
        late = desk.submit(ask(2, step=1))
        assert late.result(5.0).latency < 0.5
        other = desk.submit(ask(3, step=2))
        time.sleep(0.1)
        assert not other.done()


class Slow:
    """The first call of each query hangs, later ones answer at once."""

    max_batch_size = 1
    priced = True

    def __init__(self, second: ExpertReply | None = None) -> None:
        self.calls: dict[str, int] = {}
        self.open = 0
        self.second = second or ExpertReply("quick", Usage(2, 1, 0.1))

    def worst_case(self, request: ConsultRequest) -> Usage:
        return Usage(10, 10, 1.0)

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        query = requests[0].query
        self.calls[query] = self.calls.get(query, 0) + 1
        if self.calls[query] > 1:
            return [self.second]
        self.open += 1
        try:
            await asyncio.sleep(0.6)
        finally:
            self.open -= 1
        return [ExpertReply("slow", Usage(2, 1, 0.2))]


def test_a_hedge_overtakes_a_late_call_and_both_are_paid() -> None:
    expert = Slow()
    policy = ConsultPolicy(timeout=10.0, hedge_after=0.05)
    with ConsultScheduler(expert, policy, Budget(money=5.0)) as desk:
        result = desk.submit(ask()).result(5.0)
        metrics = desk.drain_metrics()
    assert (result.text, expert.open) == ("quick", 0)
    assert desk.ledger.total().nano == 1_100_000_000  # the lost call keeps its worst case
    assert desk.ledger.total().consults == 2
    assert (metrics["expert/hedges"], metrics["expert/hedges_won"]) == (1, 1)
    assert metrics["expert/sent"] == 2
    assert [a.hedge for a in result.trace.attempts] == [True, False]
    assert result.cost == pytest.approx(1.1)


def test_hedges_stay_inside_budget_share_and_slots() -> None:
    policy = ConsultPolicy(timeout=10.0, hedge_after=0.05)
    with ConsultScheduler(Slow(), policy, Budget(money=1.5)) as desk:
        assert desk.submit(ask()).result(5.0).text == "slow"
        assert desk.drain_metrics()["expert/hedges_refused"] == 1
        assert desk.ledger.total().nano == 200_000_000
    with ConsultScheduler(Slow(), policy) as desk:
        handles = [desk.submit(ask(i)) for i in range(60)]
        texts = [handle.result(5.0).text for handle in handles]
        assert texts.count("quick") == desk.drain_metrics()["expert/hedges"] <= 1 + 0.05 * 60
    narrow = ConsultPolicy(timeout=10.0, hedge_after=0.05, max_concurrency=1)
    with ConsultScheduler(Slow(), narrow) as desk:
        assert desk.submit(ask()).result(5.0).text == "slow"


def test_a_hedge_that_fails_leaves_the_first_call_its_time() -> None:
    expert = Slow(ExpertReply.failed("refused"))
    with ConsultScheduler(expert, ConsultPolicy(timeout=10.0, hedge_after=0.05)) as desk:
        assert desk.submit(ask()).result(5.0).text == "slow"
    expert = Slow()
    expert.second = ExpertReply.failed("refused")
    policy = ConsultPolicy(timeout=0.2, hedge_after=0.05)
    with ConsultScheduler(expert, policy, Budget(consults=9)) as desk:
        assert desk.submit(ask()).result(5.0).status == "timeout"
        time.sleep(0.05)
        assert all(not any(a.reserved) for a in desk.ledger._accounts.values())
    assert expert.open == 0


def test_a_probe_is_one_call_even_where_hedges_are_allowed() -> None:
    class Dead:
        max_batch_size = 1
        calls = open = peak = 0

        async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
            self.calls += 1
            self.open += 1
            self.peak = max(self.peak, self.open)
            await asyncio.sleep(0.15)
            self.open -= 1
            return [ExpertReply.failed("down", retry=False)]

    expert = Dead()
    policy = ConsultPolicy(
        timeout=10.0, breaker_failures=2, breaker_period=0.3, hedge_after=0.02, hedge_share=1.0
    )
    with ConsultScheduler(expert, policy) as desk:
        for number in range(2):
            assert desk.submit(ask(number)).result(5.0).status == "down"
        assert expert.peak == 2
        time.sleep(0.35)
        expert.calls = expert.peak = 0
        handles = [desk.submit(ask(10 + number)) for number in range(10)]
        assert {handle.result(5.0).status for handle in handles} == {"down"}
    assert (expert.calls, expert.peak) == (1, 1)


def test_looking_up_a_name_leaves_no_thread(chat: ModuleType) -> None:
    before = set(threading.enumerate())
    with chat.ChatServer() as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with ConsultScheduler(OpenAICompatible(url, "m"), PATIENT) as desk:
            assert desk.submit(ask()).result(5.0).status == "ok"
        left = set(threading.enumerate()) - before
        assert not [thread.name for thread in left if thread.name.startswith("asyncio")]


def test_a_fault_inside_the_desk_is_an_outcome_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eapo_fast.experts.dispatch.call_expert", lambda *_: None)
    with ConsultScheduler(Batches(1), PATIENT, Budget(consults=3)) as desk:
        start = time.monotonic()
        result = desk.submit(ask()).result(9.0)
        assert (result.status, result.detail.startswith("TypeError")) == ("malformed", True)
        assert time.monotonic() - start < 5.0
        assert not any(account.reserved != (0, 0, 0) for account in desk.ledger._accounts.values())


def test_wait_reports_each_completion_once() -> None:
    release = threading.Event()
    with ConsultScheduler(Function(lambda r: "r" if release.wait(5.0) else ""), PATIENT) as desk:
        assert not desk.wait(5.0)
        desk.submit(ask())
        assert not desk.wait(0.02)
        release.set()
        assert desk.wait(5.0)
        assert not desk.wait(5.0)
        release.clear()
        unfinished = desk.submit(ask(1))
        with pytest.raises(TimeoutError):
            unfinished.result(0.01)
        release.set()


def test_metric_names_are_fixed_and_counts_add_up() -> None:
    def fn(request: ConsultRequest) -> str:
        if request.prompt % 3 == 0:
            raise ValueError("bad query")
        return "r"

    policy = ConsultPolicy(schedule="inverse")
    with ConsultScheduler(Function(fn, immediate=True), policy, Budget(consults=30)) as desk:
        empty = desk.drain_metrics()
        for i in range(200):
            desk.submit(ask(i, step=2, prompt=i))
        desk.flush()
        metrics = desk.drain_metrics()
    assert empty.keys() == metrics.keys()
    assert set(empty.values()) == {0.0}
    assert sum(metrics[f"expert/{status}"] for status in STATUSES) == metrics["expert/asked"] == 200
    assert metrics["expert/saved_by_gate"] == metrics["expert/declined"] > 60
    assert metrics["expert/sent"] == metrics["expert/ok"] + metrics["expert/malformed"]
    assert metrics["expert/budget"] > 0


def test_long_replies_are_cut_and_flagged() -> None:
    policy = ConsultPolicy(max_reply_tokens=4)
    with ConsultScheduler(Function(lambda r: "y" * 100, immediate=True), policy) as desk:
        result = desk.submit(ask()).result()
    assert (result.status, result.text, result.truncated) == ("ok", "y" * 32, True)


def test_an_immediate_expert_that_waits_is_told_so() -> None:
    class Liar(Batches):
        immediate = True

        async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
            await asyncio.sleep(0)
            return []

    with ConsultScheduler(Liar(2)) as desk:
        result = desk.submit(ask()).result()
    assert result.status == "malformed"
    assert "immediate=True" in result.detail


def test_unusable_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.Function"):
        ConsultScheduler(lambda request: "r")
    with pytest.raises(ConfigError, match="sync function"):
        Function(Silent().answer, immediate=True)


def test_probe_reports_in_words_and_never_raises() -> None:
    class Sick(Batches):
        def probe(self) -> str | None:
            raise OSError("no route")

    with ConsultScheduler(Sick(1)) as desk:
        assert desk.probe() == "OSError: no route"
    with ConsultScheduler(Batches(1)) as desk:
        assert desk.probe() is None


def test_one_function_serves_two_schedulers_in_turn_and_at_once() -> None:
    expert = Function(lambda request: request.query)
    with ConsultScheduler(expert) as one, ConsultScheduler(expert) as two:
        assert one.submit(ask(1)).result(5.0).text == "q1"
        assert two.submit(ask(2)).result(5.0).text == "q2"
        one.close()
        assert two.submit(ask(3)).result(5.0).text == "q3"
    with ConsultScheduler(expert) as third:
        assert third.submit(ask(4)).result(5.0).text == "q4"


def test_an_unreadable_reply_is_not_kept_for_others() -> None:
    texts = iter(["", "", "5"])
    expert = Function(lambda request: next(texts))
    policy = ConsultPolicy(timeout=10.0, dedup="run", retries={"malformed": 0})
    with ConsultScheduler(expert, policy) as desk:
        results = [desk.submit(ConsultRequest("2+3")).result() for _ in range(4)]
    assert [r.status for r in results] == ["malformed", "malformed", "ok", "cached"]
    assert [r.text for r in results] == ["", "", "5", "5"]
