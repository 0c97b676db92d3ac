"""What is found in the cache, what is not, and what is thrown out first."""

from __future__ import annotations

import pytest
from harness import (
    TOKEN_BYTES,
    Harness,
    Shape,
    W,
    commit,
    make_pool,
    make_scheduler,
    scheduler_on,
    step,
)
from twin_decoder import TwinRules

PLAIN = TwinRules()


def _prefill(scheduler, prompt, **kwargs) -> list[int]:
    """Positions computed for one row of this prompt, which then ends."""
    scheduler.add_group(list(prompt), 1, scheduler.add_rules(), 1, **kwargs)
    plan, _ = step(scheduler, W[0])
    return plan.positions.tolist()


def test_a_prompt_is_found_by_full_blocks_and_one_token_is_left_to_compute():
    scheduler = make_scheduler(block_size=4)
    assert _prefill(scheduler, W[:12]) == list(range(12))
    assert _prefill(scheduler, W[:12]) == [8, 9, 10, 11]
    assert _prefill(scheduler, W[:13]) == [12]
    assert _prefill(scheduler, [*W[:7], W[9], *W[8:13]]) == list(range(4, 13))
    assert scheduler.stats()["prefix_hit_tokens"] == 8 + 12 + 4


def test_equal_blocks_behind_other_tokens_are_not_found():
    scheduler = make_scheduler(block_size=2)
    _prefill(scheduler, W[:6])
    assert _prefill(scheduler, W[2:6]) == [0, 1, 2, 3]
    assert _prefill(scheduler, [*W[4:6], *W[2:6]]) == list(range(6))


def test_partial_blocks_are_never_found():
    scheduler = make_scheduler(block_size=8)
    _prefill(scheduler, W[:7])
    assert _prefill(scheduler, W[:8]) == list(range(8))


def test_nothing_is_found_before_its_kv_is_computed():
    scheduler = make_scheduler(block_size=4, max_step_tokens=8)
    rules = scheduler.add_rules()
    scheduler.add_group(W[:4], 1, rules, 1)
    scheduler.add_group(W[:5], 1, rules, 1)
    plan = scheduler.plan()
    assert plan.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_what_two_rows_computed_at_once_is_stored_once():
    scheduler = make_scheduler(block_size=4, max_step_tokens=64)
    rules = scheduler.add_rules()
    for _ in range(2):
        scheduler.add_group(W[:9], 1, rules, 3)
    step(scheduler, W[0])
    scheduler.check()
    plan, _ = step(scheduler, W[1])
    assert plan.block_tables[0, :2].tolist() == plan.block_tables[1, :2].tolist()
    assert plan.block_tables[0, 2] != plan.block_tables[1, 2]
    assert scheduler.stats()["free_blocks"] == 64 - 2 - 2


def test_generated_and_injected_tokens_are_found_too():
    scheduler = make_scheduler(block_size=4)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    (seq,) = scheduler.add_group(W[:3], 1, rules, 9)
    tag = TOKEN_BYTES.index(b"<q>")
    step(scheduler, tag)
    scheduler.inject(seq, W[5:9])
    step(scheduler, W[0])
    scheduler.finish(seq, "stop")
    assert _prefill(scheduler, [*W[:3], tag, *W[5:9], W[0]]) == [8]


def test_without_the_prefix_cache_nothing_is_found_but_siblings_share():
    scheduler = make_scheduler(block_size=4, prefix_cache=False)
    assert _prefill(scheduler, W[:12]) == _prefill(scheduler, W[:12]) == list(range(12))
    scheduler.add_group(W[:8], 3, scheduler.add_rules(), 4)
    step(scheduler, W[0])
    plan, _ = step(scheduler, W[0])
    assert (plan.block_tables[:, :2] == plan.block_tables[0, :2]).all()
    assert scheduler.stats()["shared_blocks"] == 4


def test_the_cache_outlives_a_scheduler_but_not_an_epoch():
    shape = Shape(block_size=4)
    pool = make_pool(shape)
    assert _prefill(scheduler_on(pool, shape), W[:9]) == list(range(9))
    assert _prefill(scheduler_on(pool, shape), W[:9]) == [8]
    pool.advance_epoch()
    assert pool.epoch == 1
    assert pool.num_cached == 2
    assert _prefill(scheduler_on(pool, shape), W[:9]) == list(range(9))
    assert _prefill(scheduler_on(pool, shape), W[:9]) == [8]


def test_a_row_that_crosses_an_epoch_keeps_its_kv_and_caches_nothing():
    harness = Harness(Shape(block_size=2))
    (seq,) = harness.add(W[:6], 1, PLAIN, max_tokens=20, prompt_id=0)
    harness.step()
    harness.pool.advance_epoch()
    cached = harness.pool.num_cached
    for _ in range(6):
        harness.step()
    assert harness.scheduler.stats()["prefill_tokens"] == 6
    assert harness.pool.num_cached == cached
    text = harness.twins[seq].prompt + harness.twins[seq].token_ids
    harness.finish(seq, "cancelled")
    harness.add(text, 1, PLAIN, max_tokens=2, prompt_id=1)
    harness.step()
    assert harness.scheduler.stats()["prefix_hit_tokens"] == 0


def test_an_epoch_between_plan_and_commit_caches_nothing():
    shape = Shape(block_size=4)
    pool = make_pool(shape)
    scheduler = scheduler_on(pool, shape)
    scheduler.add_group(W[:9], 1, scheduler.add_rules(), 1)
    plan = scheduler.plan()
    pool.advance_epoch()
    commit(scheduler, plan, [W[0]])
    assert pool.num_cached == 0


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("asked", "computed"), [("old", [2, 3, 4]), ("new", [4])])
def test_the_least_recently_freed_block_goes_first_and_tails_before_heads(again, asked, computed):
    scheduler = make_scheduler(num_blocks=6, block_size=2, max_context=12)
    old, new = W[:5], W[10:15]
    for prompt in (old, new, old) if again else (old, new):
        _prefill(scheduler, prompt)
    assert scheduler.stats()["evicted_blocks"] == 0
    _prefill(scheduler, W[18:24])  # two free blocks hold nothing, the third one does
    assert scheduler.stats()["evicted_blocks"] == 1
    if again:
        old, new = new, old
    assert _prefill(scheduler, {"old": old, "new": new}[asked]) == computed


def test_a_sibling_that_lost_its_prompt_finds_it():
    scheduler = make_scheduler(block_size=2, num_blocks=16, max_context=32)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    first, second = scheduler.add_group(W[:8], 2, rules, 9)
    step(scheduler, TOKEN_BYTES.index(b"<q>"))
    scheduler.add_group(W[8:24] + W[:8], 1, scheduler.add_rules(), 8)
    while scheduler.stats()["running"] + scheduler.stats()["waiting"]:
        step(scheduler, W[0])
    for seq in (first, second):
        scheduler.inject(seq, [W[1]])
        plan, _ = step(scheduler, W[0])
    assert plan.seqs.tolist() == [first, second]
    assert plan.positions.tolist()[-2:] == [8, 9]


def test_a_prompt_that_finds_no_room_takes_no_blocks():
    shape = Shape(num_blocks=12, block_size=2, max_context=24)
    pool = make_pool(shape)
    _prefill(scheduler_on(pool, shape), W[:8])
    scheduler = scheduler_on(pool, shape)
    rules = scheduler.add_rules()
    scheduler.add_group(W[12:16], 1, rules, 20)
    scheduler.add_group(W[:9], 1, rules, 20)
    for blocks in (2, 3, 3, 4):
        step(scheduler, W[0])
        assert scheduler.stats()["prefix_hit_tokens"] == 0
        assert pool.num_free == 12 - blocks
