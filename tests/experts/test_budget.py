from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.experts import (
    Budget,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    ExpertReply,
    Function,
    Ledger,
    Usage,
)
from eapo_fast.experts.budget import NANO, Reservation

EVENTS = int(os.environ.get("EAPO_FAST_BUDGET_EVENTS", "60000"))
"""`EAPO_FAST_BUDGET_EVENTS=1000000` is the figure to hold."""


def test_caps_hold_over_random_events() -> None:
    """At every event, with up to 512 consults under way, through kills and restarts."""
    rng = random.Random(7)
    budgets = [
        Budget(consults=EVENTS // 3, tokens=70 * EVENTS, money=1e-4 * EVENTS),
        Budget(consults=700, per="step"),
        Budget(tokens=9_001, money=0.017, per="prompt"),
        Budget(consults=2, per="rollout"),
    ]
    ledger = Ledger(budgets)
    held: list[tuple[Reservation, Usage]] = []
    most = kills = 0
    for event in range(EVENTS):
        if len(held) < 512 and rng.random() < 0.7:
            request = ConsultRequest(
                "q", step=event // 3000, prompt=rng.randrange(170), rollout=rng.randrange(5)
            )
            worst = Usage(rng.randrange(400), rng.randrange(600), rng.random() * 2e-3)
            held += [(one, worst)] if (one := ledger.reserve(request, worst)) else []
        elif held:
            one, worst = held.pop(rng.randrange(len(held)))
            _finish(ledger, one, worst, rng)
        most = max(most, len(held))
        total = ledger.total()
        assert total.consults <= EVENTS // 3
        assert total.tokens <= 70 * EVENTS
        assert total.nano <= int(1e-4 * EVENTS * NANO)
        if event % 9973 == 9972:
            kills += 1
            _check_accounts(ledger)
            ledger.forget(before=event // 3000 - 1)
            saved, ledger, held = json.dumps(ledger.state_dict()), Ledger(budgets), []
            ledger.load_state_dict(json.loads(saved))
            assert ledger.total() == total
    _check_accounts(ledger)
    assert ledger.overruns == 0
    assert (most, kills) == (512, EVENTS // 9973)


class _Watched(Ledger):
    """Checks every cap after every event."""

    events = 0

    def reserve(self, request: ConsultRequest, worst: Usage) -> Reservation | None:
        held = super().reserve(request, worst)
        self._check()
        return held

    def _close(self, *given: Any) -> Any:
        amount = super()._close(*given)
        self._check()
        return amount

    def _check(self) -> None:
        self.events += 1
        total = self.total()
        assert all(b.allows(total) for b in self.budgets if b.per == "run")


@pytest.mark.parametrize("hedge", [None, 0.01])
def test_caps_hold_with_512_concurrent_consults_of_a_scheduler(hedge: float | None) -> None:
    """Retries, hedges, timeouts, cancellations, unknown outcomes and refusals, all at once."""
    rng, peak, running, full = random.Random(3), 0, 0, asyncio.Event()

    async def moody(request: ConsultRequest) -> ExpertReply:
        nonlocal peak, running
        running += 1
        peak = max(peak, running)
        try:
            if running == 512:
                full.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(full.wait(), 1.0)
            await asyncio.sleep(rng.random() * 0.02)
            if rng.random() < 0.02:
                await asyncio.sleep(10.0)
        finally:
            running -= 1
        usage = Usage(rng.randrange(50), rng.randrange(100), rng.random() * 0.01)
        kinds = [
            ExpertReply("r", usage),
            ExpertReply("r"),
            ExpertReply.failed("down", billed=rng.random() < 0.5, usage=usage),
            ExpertReply.failed("refused"),
        ]
        if hedge is None:  # fewer calls at once would leave no slot free for hedges
            kinds.append(ExpertReply.failed("rate", billed=False))
        return rng.choice(kinds)

    ledger = _Watched([Budget(consults=2500, tokens=400_000, money=20.0), Budget(3, per="rollout")])
    expert = Function(moody, max_cost=0.01, max_reply_tokens=100)
    policy = ConsultPolicy(
        timeout=2.0,
        max_concurrency=512,
        breaker_failures=10**6,
        dedup="off",
        hedge_after=hedge,
        hedge_share=0.2,
    )
    with ConsultScheduler(expert, policy, ledger) as desk:
        handles = [desk.submit(ConsultRequest(f"{i}", rollout=i % 1500)) for i in range(3000)]
        for handle in handles[::41]:
            handle.cancel()
        statuses = Counter(handle.result(10.0).status for handle in handles)
        metrics = desk.drain_metrics()
    assert sum(statuses.values()) == 3000
    assert min(statuses[s] for s in ("ok", "budget", "timeout", "cancelled", "refused")) > 0
    assert peak == 512
    assert ledger.events > 4000
    assert ledger.overruns == 0
    assert all(not any(account.reserved) for account in ledger._accounts.values())
    assert (metrics["expert/hedges"] > 0) == (hedge is not None)


def _finish(ledger: Ledger, one: Reservation, worst: Usage, rng: random.Random) -> None:
    fate = rng.randrange(3)
    if fate == 0:
        ledger.release(one)
    elif fate == 1:
        ledger.settle(one, None)
    else:
        share = rng.random()
        used = Usage(
            int(worst.prompt_tokens * share), int(worst.completion_tokens * share), worst.cost
        )
        ledger.settle(one, used)
    ledger.release(one)


def _check_accounts(ledger: Ledger) -> None:
    for per, book in ledger.state_dict()["accounts"].items():
        for consults, tokens, nano in book.values():
            for budget in (budget for budget in ledger.budgets if budget.per == per):
                assert budget.consults is None or consults <= budget.consults
                assert budget.tokens is None or tokens <= budget.tokens
                assert budget.money is None or nano <= budget.money * NANO


def test_unknown_outcome_keeps_the_worst_case_and_an_overrun_is_counted() -> None:
    ledger = Ledger(Budget(tokens=100))
    first = ledger.reserve(ConsultRequest("q"), Usage(10, 50))
    assert first is not None
    ledger.settle(first, None)
    assert ledger.total().tokens == 60
    second = ledger.reserve(ConsultRequest("q"), Usage(10, 30))
    assert second is not None
    ledger.settle(second, Usage(10, 90))
    assert (ledger.total().tokens, ledger.overruns) == (160, 1)
    assert ledger.reserve(ConsultRequest("q"), Usage(0, 0)) is None


def test_state_survives_json_and_counts_open_reservations_as_spent() -> None:
    ledger = Ledger([Budget(consults=3), Budget(consults=1, per="rollout")])
    assert ledger.reserve(ConsultRequest("q", step=4, prompt=2, rollout=1), Usage(5, 5))
    copy = Ledger(ledger.budgets)
    copy.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert copy.state_dict() == ledger.state_dict()
    assert copy.reserve(ConsultRequest("q", step=4, prompt=2, rollout=1), Usage(0, 0)) is None
    assert copy.reserve(ConsultRequest("q", step=4, prompt=2, rollout=0), Usage(0, 0))
    with pytest.raises(DataError, match="ledger"):
        copy.load_state_dict({"accounts": {"run": {"": ["a"]}}})


def test_a_budget_refuses_with_its_status_and_never_oversends() -> None:
    calls: list[str] = []

    def answer(request: ConsultRequest) -> ExpertReply:
        calls.append(request.query)
        return ExpertReply("r", Usage(1, 1))

    with ConsultScheduler(Function(answer), ConsultPolicy(), Budget(consults=5)) as desk:
        handles = [desk.submit(ConsultRequest(f"q{i}")) for i in range(40)]
        statuses = [handle.result(5.0).status for handle in handles]
        state = desk.state_dict()
    assert len(calls) == statuses.count("ok") == 5
    assert statuses.count("budget") == 35
    with ConsultScheduler(Function(answer), budget=Budget(consults=6)) as again:
        again.load_state_dict(json.loads(json.dumps(state)))
        statuses = [again.submit(ConsultRequest(f"n{i}")).result(5.0).status for i in range(3)]
    assert statuses == ["ok", "budget", "budget"]


def test_money_needs_prices() -> None:
    with pytest.raises(ConfigError, match="no prices"):
        ConsultScheduler(Function(lambda request: "r"), budget=Budget(money=1.0))
    with ConsultScheduler(
        Function(lambda request: ExpertReply("r", Usage(1, 1, 0.3)), max_cost=0.4),
        budget=Budget(money=1.0),
    ) as desk:
        results = [desk.submit(ConsultRequest(f"{i}")).result(5.0) for i in range(5)]
    assert [result.status for result in results] == ["ok", "ok", "ok", "budget", "budget"]
    assert results[0].cost == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [{"per": "day"}, {"consults": -1}, {"money": float("nan")}])
def test_bad_budgets_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Budget(**bad)


def _spend(ledger: Ledger, rng: random.Random, held: list[tuple[Reservation, Usage]]) -> None:
    if len(held) < 9 and rng.random() < 0.6:
        request = ConsultRequest("q", step=rng.randrange(1, 3), rollout=rng.randrange(3))
        worst = Usage(rng.randrange(40), rng.randrange(60), rng.random() * 2e-3)
        held += [(one, worst)] if (one := ledger.reserve(request, worst)) else []
    elif held:
        _finish(ledger, *held.pop(rng.randrange(len(held))), rng)


def test_a_kill_forgets_nothing_that_was_spent_after_the_checkpoint(tmp_path: Path) -> None:
    """100 kills in one run: each time the books are what they were, to the last unit."""
    rng, budgets = random.Random(4), [Budget(consults=4000), Budget(tokens=9000, per="rollout")]
    path = tmp_path / "ledger.jsonl"
    ledger, held = Ledger(budgets), []
    ledger.keep_journal(path, resumed=False)
    checkpoint = json.dumps(ledger.state_dict())
    for kill in range(100):
        for _ in range(rng.randrange(30)):
            _spend(ledger, rng, held)
        if rng.random() < 0.3:
            checkpoint = json.dumps(ledger.state_dict())
        expected = ledger.state_dict()["accounts"]
        with path.open("ab") as file:
            file.write(b'{"n": 12, "acc' * (kill % 2))  # the line that the kill cut
        ledger, held = Ledger(budgets), []
        ledger.load_state_dict(json.loads(checkpoint))
        ledger.keep_journal(path, resumed=True)
        assert ledger.state_dict()["accounts"] == expected
    assert ledger.total().consults > 500
    ledger.close()


def test_a_resumed_run_counts_what_it_spent_before_it_died(tmp_path: Path) -> None:
    """The cap of 10 holds over a run that dies after each fourth consult and begins again."""
    calls: list[str] = []
    expert = Function(lambda request: calls.append(request.query) or "r")
    for life in range(4):
        ledger = Ledger(Budget(consults=10))
        ledger.keep_journal(tmp_path / "ledger.jsonl", resumed=life > 0)
        with ConsultScheduler(expert, ConsultPolicy(), ledger) as desk:
            for i in range(4):
                desk.submit(ConsultRequest(f"{life} {i}")).result(5.0)
        ledger.close()
    assert len(calls) == 10


def test_without_a_place_to_remember_nothing_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(Budget(consults=10))
    ledger.keep_journal(tmp_path / "ledger.jsonl", resumed=False)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eapo_fast.experts.journal.Journal.write", full)
    for _ in range(3):
        assert ledger.reserve(ConsultRequest("q"), Usage(1, 1)) is None
    assert caplog.text.count("No space left on device") == 1
    assert ledger.total().consults == 0
    ledger.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="journal"):
        ledger.keep_journal(tmp_path / "file" / "ledger.jsonl", resumed=True)


def test_a_reservation_of_closed_books_changes_nothing() -> None:
    ledger = Ledger(Budget(consults=5))
    old = ledger.reserve(ConsultRequest("q"), Usage(1, 1))
    assert old is not None
    ledger.load_state_dict(ledger.state_dict())
    ledger.release(old)
    ledger.settle(old, Usage(9, 9))
    assert ledger.total().consults == 1
