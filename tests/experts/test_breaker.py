from __future__ import annotations

import random

import pytest

from eapo_fast.experts.breaker import Breaker


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_the_promises(seed: int) -> None:
    rng = random.Random(seed)
    breaker, now, calls = Breaker(3, 10.0), 0.0, 0
    last_probe = -1e9
    for _ in range(2000):
        now += rng.random() * 3
        was = breaker.state
        if rng.random() < 0.5 and breaker.allow(now):
            calls += 1
            if was != "closed":
                assert breaker.state == "half_open"
                assert now - last_probe >= 10.0
                assert not breaker.allow(now + 1e6)
                last_probe = now
        if calls and rng.random() < 0.4:
            calls -= 1
            ending = rng.choice(("failure", "failure", "success"))
            if ending == "success":
                breaker.success()
                assert breaker.state == "closed"
                last_probe = -1e9
            else:
                breaker.failure(now)
                assert breaker.state != "half_open"


def test_an_abandoned_probe_may_be_repeated_at_once() -> None:
    breaker = Breaker(1, 10.0)
    breaker.failure(0.0)
    assert not breaker.allow(9.9)
    assert breaker.allow(10.0)
    breaker.abandon(11.0)
    assert breaker.allow(11.0)
    assert not breaker.allow(11.0)
