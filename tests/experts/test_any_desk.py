"""Desks of random settings with experts of random moods: what holds for every one of them.

`EAPO_FAST_DESKS=1000 pytest tests/experts/test_any_desk.py` tries 1000 desks instead of 30 (three
minutes).
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from eapo_fast.experts import (
    STATUSES,
    Budget,
    ConsultHandle,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    Expert,
    ExpertReply,
    Ledger,
    Pool,
    Recorded,
    Usage,
)

DESKS = int(os.environ.get("EAPO_FAST_DESKS", "30"))
SLACK = 1.0
"""Seconds beyond the deadline: the machine may be busy."""


class Moody:
    """Answers, refuses, breaks off, raises, hangs, or miscounts."""

    priced = True

    def __init__(self, seed: int, batch: int) -> None:
        self.rng = random.Random(seed)
        self.max_batch_size = batch
        self.open = 0

    def worst_case(self, request: ConsultRequest) -> Usage:
        return Usage(10, 10, 0.01)

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        self.open += 1
        try:
            mood = self.rng.random()
            await asyncio.sleep(self.rng.random() * 0.02)
            if mood < 0.05:
                await asyncio.sleep(60.0)
            if mood < 0.15:
                errors = [OSError("x"), ValueError("y"), asyncio.CancelledError(), SystemExit(1)]
                raise self.rng.choice(errors)
            replies = [self._reply(request) for request in requests]
            return replies[:-1] if mood > 0.98 else replies
        finally:
            self.open -= 1

    def _reply(self, request: ConsultRequest) -> ExpertReply:
        draw, billed = self.rng.random(), self.rng.random() < 0.5
        if draw < 0.15:
            pause = self.rng.choice([None, 0.0, 0.02, 5.0])
            return ExpertReply.failed("rate", retry_after=pause, billed=billed)
        if draw < 0.25:
            return ExpertReply.failed("down", billed=billed)
        if draw < 0.3:
            return ExpertReply.failed("refused", unfit=billed, billed=False)
        if draw < 0.35:
            return ExpertReply("")
        return ExpertReply(f"t{request.query}", Usage(3, 3, 0.002) if draw < 0.9 else None)


def settings(rng: random.Random, folder: Path) -> ConsultPolicy:
    return ConsultPolicy(
        timeout=rng.choice([0.05, 0.2, 0.5]),
        step_timeout=rng.choice([None, 0.3]),
        max_concurrency=rng.choice([1, 4, 64]),
        max_wait=rng.choice([0.0, 0.005]),
        dedup=rng.choice(["off", "in_flight", "step", "run"]),
        cache=rng.choice([None, None, "memory", folder / "cache.sqlite"]),
        record=rng.choice([None, folder / "record.jsonl"]),
        hedge_after=rng.choice([None, 0.005]),
        hedge_share=1.0,
        retries=rng.choice([0, 3, {"rate": 5, "down": 2, "malformed": 1}]),
        breaker_failures=rng.choice([2, 1000]),
        breaker_period=0.05,
        schedule=rng.choice(["constant", "inverse"]),
        gate=rng.choice(["before_dispatch", "after_reply"]),
    )


def budgets(rng: random.Random) -> list[Budget]:
    caps = [
        Budget(money=rng.choice([0.05, 0.3, 100.0])),
        Budget(consults=rng.choice([2, 50]), per="rollout"),
        Budget(tokens=rng.choice([100, 5000]), per="step"),
    ]
    return rng.sample(caps, rng.randint(0, 3))


def ask(desk: ConsultScheduler, rng: random.Random) -> list[ConsultHandle]:
    """Submit up to 150 consults, some of them equal, and give up a few."""
    handles = []
    for turn in range(rng.randint(1, 150)):
        query, rollout = f"q{rng.randrange(20)}", rng.randrange(8)
        request = ConsultRequest(query, step=1 + turn // 60, rollout=rollout, turn=turn)
        handles.append(desk.submit(request))
        if rng.random() < 0.1:
            desk.flush()
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.01)
        if rng.random() < 0.03:
            rng.choice(handles).cancel()
        if rng.random() < 0.01:
            desk.checkpointed()
    return handles


def check(desk: ConsultScheduler, handles: Sequence[ConsultHandle]) -> None:
    """Statuses add up, charges are the ledger's, no cap is passed, nothing is held."""
    results = [handle.result(0.0) for handle in handles]
    for handle, result in zip(handles, results, strict=True):
        assert result.text == (f"t{handle.request.query}" if result.accepted else "")
    metrics, ledger = desk.drain_metrics(), desk.ledger
    assert sum(metrics[f"expert/{status}"] for status in STATUSES) == len(handles)
    assert round(sum(result.cost for result in results) * 1e9) == ledger.total().nano
    assert ledger.overruns == 0
    assert not any(any(account.reserved) for account in ledger._accounts.values())
    for (per, _), account in ledger._accounts.items():
        assert all(b.allows(account.committed) for b in ledger.budgets if b.per == per)


@pytest.mark.parametrize("seed", range(DESKS))
def test_what_holds_at_every_desk(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eapo_fast.experts.dispatch.BACKOFF_BASE", 0.01)
    rng, before = random.Random(seed), set(threading.enumerate())
    members = [Moody(seed + i, rng.choice([1, 1, 1, 4])) for i in range(3)]
    expert: Expert = Pool(members) if rng.random() < 0.4 else members[0]
    policy, ledger = settings(rng, tmp_path), Ledger(budgets(rng))
    ledger.keep_journal(tmp_path / "ledger.jsonl", resumed=False)
    desk = ConsultScheduler(expert, policy, ledger, seed=seed)
    desk.keep_replies(tmp_path / "replies.jsonl", after=None)
    handles = ask(desk, rng)
    if rng.random() < 0.7:
        end = time.monotonic() + policy.timeout + SLACK
        assert all(handle.result(max(0.0, end - time.monotonic())) for handle in handles)
    desk.close()
    check(desk, handles)
    assert not any(member.open for member in members)
    assert not set(threading.enumerate()) - before
    if policy.record is not None:
        Recorded(policy.record)
    _check_journal(ledger, tmp_path / "ledger.jsonl")


def _check_journal(ledger: Ledger, path: Path) -> None:
    """The books of a run that died now are those of the run."""
    ledger.close()
    again = Ledger(ledger.budgets)
    again.keep_journal(path, resumed=True)
    assert again.total() == ledger.total()
    again.close()
