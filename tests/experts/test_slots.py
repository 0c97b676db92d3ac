"""How many calls at once: what a server bears is found, and used."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, ExpertReply
from eapo_fast.experts.slots import Slots


def run(coroutine: object) -> None:
    asyncio.run(coroutine)  # type: ignore[arg-type]


def test_turns_are_taken_in_order_and_a_cancelled_one_goes_to_the_next() -> None:
    order: list[int] = []

    async def worker(slots: Slots, number: int) -> None:
        async with slots:
            order.append(number)
            await asyncio.sleep(0.001)

    async def main() -> None:
        slots = Slots(2)
        tasks = [asyncio.create_task(worker(slots, n)) for n in range(8)]
        await asyncio.sleep(0)
        assert (slots.busy, slots.locked()) == (2, True)
        tasks[3].cancel()
        slots._wake()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (slots.busy, slots.locked()) == (0, False)

    run(main())
    assert order == [0, 1, 2, 4, 5, 6, 7]


def test_a_turn_that_comes_in_the_moment_of_a_cancellation_is_not_lost() -> None:
    async def main() -> None:
        slots = Slots(1)
        await slots.__aenter__()
        first = asyncio.create_task(slots.__aenter__())
        second = asyncio.create_task(slots.__aenter__())
        await asyncio.sleep(0)
        await slots.__aexit__()  # the turn is the first one's now
        first.cancel()
        await asyncio.wait_for(second, 1.0)
        assert slots.busy == 1
        with pytest.raises(asyncio.CancelledError):
            await first

    run(main())


def test_a_burst_of_refusals_halves_once_and_answers_bring_back_one_a_round() -> None:
    slots = Slots(64)
    slots.busy = 64
    for _ in range(60):
        slots.too_many(0)
    assert slots.limit == 32
    slots.busy = 5
    slots.too_many(1)
    assert slots.limit == 2.5
    slots.too_many(1)
    slots.too_many(2)
    assert slots.limit == 1.25
    for _ in range(3):
        slots.too_many(slots.cuts)
    assert slots.limit == 1.0
    rounds = [slots.answered() for _ in range(3)]
    assert len(rounds) == 3
    assert 2.5 < slots.limit < 3.0
    for _ in range(10_000):
        slots.answered()
    assert slots.limit == 64


@pytest.mark.parametrize("seed", range(4))
def test_no_turn_is_lost_or_doubled_whatever_happens(seed: int) -> None:
    """Random waits, cancellations, refusals and answers; in the end everybody has had a turn."""
    rng = random.Random(seed)

    async def worker(slots: Slots) -> None:
        async with slots:
            cuts = slots.cuts
            await asyncio.sleep(rng.random() * 0.002)
            slots.too_many(cuts) if rng.random() < 0.3 else slots.answered()

    async def main() -> None:
        slots = Slots(rng.randint(1, 9))
        tasks = [asyncio.create_task(worker(slots)) for _ in range(300)]
        for task in rng.sample(tasks, 150):
            await asyncio.sleep(0 if rng.random() < 0.8 else 0.001)
            task.cancel()
            assert 0 <= slots.busy <= slots.most
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30.0)
        assert sum(one is None for one in done) >= 150
        assert (slots.busy, slots.locked()) == (0, False)

    run(main())


class Narrow:
    """Bears four calls at once and refuses the others."""

    max_batch_size = 1

    def __init__(self, width: int) -> None:
        self.width, self.running, self.refused, self.peak = width, 0, 0, 0

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        if self.running >= self.width:
            self.refused += 1
            return [ExpertReply.failed("rate", billed=False)]
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(0.004)
        finally:
            self.running -= 1
        return [ExpertReply("x")]


def test_a_server_that_bears_few_calls_gets_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eapo_fast.experts.dispatch.BACKOFF_BASE", 0.01)
    expert = Narrow(4)
    policy = ConsultPolicy(timeout=60.0, retries={"rate": 1000})
    with ConsultScheduler(expert, policy) as desk:
        handles = [desk.submit(ConsultRequest(f"q{i}", rollout=i)) for i in range(400)]
        assert {handle.result(60.0).status for handle in handles} == {"ok"}
        metrics = desk.drain_metrics()
    assert expert.peak == 4
    assert expert.refused == metrics["expert/retries"] < 250
    assert 1 <= metrics["expert/concurrency"] <= 4


def test_a_server_that_bears_all_gets_all() -> None:
    expert = Narrow(1000)
    with ConsultScheduler(expert, ConsultPolicy(timeout=60.0, max_concurrency=40)) as desk:
        handles = [desk.submit(ConsultRequest(f"q{i}", rollout=i)) for i in range(200)]
        assert {handle.result(60.0).status for handle in handles} == {"ok"}
        assert desk.drain_metrics()["expert/concurrency"] == 40
    assert expert.peak == 40
