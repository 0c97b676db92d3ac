"""What the consults say they cost is what the ledger has spent, to the nano-unit."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

import pytest

from eapo_fast.experts import (
    Budget,
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    ExpertReply,
    Usage,
)

WORST = Usage(10, 10, 0.01)


class Moody:
    """Answers, fails, or stays silent, by the query and the number of the attempt."""

    max_batch_size = 1
    priced = True

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def worst_case(self, request: ConsultRequest) -> Usage:
        return WORST

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        query = requests[0].query
        self.calls[query] += 1
        draw = random.Random(f"{query} {self.calls[query]}").random()
        await asyncio.sleep(0.02 * draw)
        if draw < 0.2:
            return [ExpertReply.failed("down")]
        if draw < 0.3:
            return [ExpertReply.failed("rate", billed=False)]
        if draw < 0.4:
            raise OSError("reset")
        if draw < 0.5:
            return [ExpertReply.failed("refused", usage=Usage(3, 0, 0.001))]
        if draw < 0.7:
            await asyncio.sleep(60.0)
        return [ExpertReply("x", Usage(3, 3, 0.002))]


def total(results: Sequence[ConsultResult]) -> int:
    return round(sum(result.cost for result in results) * 1e9)


@pytest.mark.parametrize("hedge", [None, 0.03])
def test_charges_add_up_to_the_ledger(hedge: float | None) -> None:
    """200 consults that share 70 questions; some are given up by their caller."""
    policy = ConsultPolicy(
        timeout=0.6, hedge_after=hedge, hedge_share=1.0, breaker_failures=1_000_000
    )
    with ConsultScheduler(Moody(), policy, Budget(money=100.0)) as desk:
        handles = [desk.submit(ConsultRequest(f"q{i % 70}", rollout=i)) for i in range(200)]
        results = [handle.result(5.0) for handle in handles]
        _wait_until_nothing_is_held(desk)
        assert total(results) == desk.ledger.total().nano > 0
        metrics = desk.drain_metrics()
    statuses = Counter(result.status for result in results)
    assert {"ok", "timeout", "refused"} <= statuses.keys()
    assert round(metrics["expert/cost"] * 1e9) == total(results)
    assert any(r.cost > 0 for r in results if r.status == "timeout")


def _wait_until_nothing_is_held(desk: ConsultScheduler) -> None:
    """What was never sent is given back a moment after the result is out."""
    end = time.monotonic() + 5.0
    while any(any(a.reserved) for a in desk.ledger._accounts.values()):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_consult_without_a_reply_says_what_it_cost() -> None:
    class Silent(Moody):
        async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
            await asyncio.sleep(60.0)
            return []

    with ConsultScheduler(Silent(), ConsultPolicy(timeout=0.2), Budget(money=1.0)) as desk:
        leader = desk.submit(ConsultRequest("q", rollout=0))
        time.sleep(0.05)
        waiter = desk.submit(ConsultRequest("q", rollout=1))
        other = desk.submit(ConsultRequest("other"))
        time.sleep(0.05)
        other.cancel()
        assert [h.result(5.0).cost for h in (leader, waiter, other)] == [0.0, 0.01, 0.01]
        assert desk.ledger.total().nano == 20_000_000


def test_failed_attempts_are_charged_to_the_consult_that_ends_by_them() -> None:
    class Down(Moody):
        async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
            return [ExpertReply.failed("down")]

    policy = ConsultPolicy(timeout=20.0, retries=2)
    with ConsultScheduler(Down(), policy, Budget(money=1.0)) as desk:
        result = desk.submit(ConsultRequest("q")).result(20.0)
    assert (result.status, result.cost, len(result.trace.attempts)) == ("down", 0.03, 3)
