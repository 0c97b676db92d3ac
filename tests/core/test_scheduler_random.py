"""Random operations on small pools: every row must become what it becomes alone."""

from __future__ import annotations

import math
import random

import pytest
from harness import TOKEN_BYTES, Harness, Shape
from twin_decoder import TwinRules

RULES = {
    "plain": TwinRules(),
    "stops": TwinRules(stop_token_ids=(20, 21), stop_patterns=(b"</q>", b"ab")),
    "parks": TwinRules(
        stop_token_ids=(22,), stop_patterns=(b"b<",), park_patterns=(b"q>", b"<q", b"w1")
    ),
    "bans": TwinRules(
        banned_token_ids=(3, 30), banned_patterns=(b"<q>", b"w2", b"w11"), park_patterns=(b"w3",)
    ),
}

SHAPES = {
    "roomy": Shape(num_blocks=96),
    "tiny-pool": Shape(num_blocks=12, block_size=4),
    "one-row-fits": Shape(num_blocks=6, block_size=8, max_batch=5, max_step_tokens=11),
    "pool-below-context": Shape(num_blocks=5, block_size=3, max_batch=4, max_step_tokens=7),
    "one-token-blocks": Shape(num_blocks=48, block_size=1, max_batch=3, max_step_tokens=9),
    "one-token-steps": Shape(num_blocks=14, max_step_tokens=1),
    "one-slot": Shape(num_blocks=15, max_batch=1, max_step_tokens=16),
    "swapping": Shape(num_blocks=14, host_blocks=20),
    "little-swap": Shape(num_blocks=10, block_size=3, host_blocks=3, max_batch=5),
    "no-prefix-cache": Shape(num_blocks=12, host_blocks=5, prefix_cache=False),
}

HEADS = [list(range(start, start + 13)) for start in (10, 15, 20)]
"""Beginnings that prompts share."""


def _ids(rng: random.Random, most: int) -> list[int]:
    return rng.choices(range(len(TOKEN_BYTES)), k=rng.randint(1, most))


def _add(harness: Harness, rng: random.Random, prompt_id: int) -> None:
    prompt = rng.choice(HEADS)[: rng.randint(0, 13)] + _ids(rng, 9)
    harness.add(
        prompt[: harness.max_context - 1],
        rng.choice([1, 1, 2, 3, 7]),
        rng.choice(list(RULES.values())),
        max_tokens=rng.randint(1, 25),
        prompt_id=prompt_id,
        temperatures=rng.choice([(), (0.5,), (1.0, 0.25, 0.125)]),
    )


def _edit(harness: Harness, rng: random.Random) -> None:
    parked, runnable = harness.rows("parked"), harness.rows("runnable")
    action = rng.random()
    if parked and action < 0.5:
        harness.inject(rng.choice(parked), _ids(rng, 9)[rng.randint(0, 1) :])
    elif parked and action < 0.6:
        harness.set_rules(rng.choice(parked), rng.choice(list(RULES.values())))
    elif parked + runnable and action < 0.64:
        harness.finish(rng.choice(parked + runnable), "cancelled")
    elif runnable and action < 0.67:
        harness.set_rules(rng.choice(runnable), rng.choice(list(RULES.values())))
    elif harness.twins and action < 0.75:
        harness.release(rng.choice(list(harness.twins)))
    elif parked and action < 0.9:
        wait = rng.choice([0.0, rng.uniform(0, 20), math.inf])
        harness.scheduler.expect_wait(rng.choice(parked), wait)
    elif action < 0.93:
        harness.scheduler.set_prefill_rate(rng.choice([1.0, 10.0, 1e6]))
    elif action < 0.96:
        harness.pool.advance_epoch()


def _drain(harness: Harness, rng: random.Random) -> None:
    for _ in range(20_000):
        if harness.step() is None:
            parked = harness.rows("parked")
            if not parked:
                return
            for seq in parked:
                harness.inject(seq, _ids(rng, 9))
    raise AssertionError("rows are left after 20,000 steps")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_become_what_they_become_alone(shape, seed):
    rng, harness = random.Random(seed), Harness(shape)
    for round_ in range(120):
        if rng.random() < 0.25:
            _add(harness, rng, prompt_id=round_)
        _edit(harness, rng)
        harness.scheduler.check()
        harness.step()
    _drain(harness, rng)
    for seq in list(harness.twins):
        harness.compare_row(seq)
        harness.release(seq)
    harness.scheduler.check()
    stats = harness.scheduler.stats()
    assert stats["free_blocks"] == shape.num_blocks
    assert stats["free_host_blocks"] == shape.host_blocks
    assert stats["running"] == stats["waiting"] == stats["parked"] == 0


def test_small_pools_do_preempt_and_fork():
    rng, harness = random.Random(1), Harness(SHAPES["tiny-pool"])
    for prompt_id in range(6):
        harness.add(_ids(rng, 9), 4, RULES["plain"], max_tokens=20, prompt_id=prompt_id)
    _drain(harness, rng)
    stats = harness.scheduler.stats()
    assert stats["preemptions"] > 0
    assert stats["shared_blocks"] > 0
    assert stats["copied_blocks"] > 0
