"""Who gets a slot, and who loses it, when the pool is too small for all."""

from __future__ import annotations

import random

import pytest
from harness import W, commit, make_scheduler, step

from eapo_fast import _core

STOP = 63


def _serve(scheduler, targets: dict[int, int]) -> tuple[int, int]:
    """Runs rows that stop at their target lengths; returns (steps, tokens computed)."""
    steps = tokens = 0
    generated = dict.fromkeys(targets, 0)
    rng = random.Random(1)
    while (plan := scheduler.plan()) is not None:
        ids = []
        for seq in plan.sample_seqs.tolist():
            generated[seq] += 1
            ids.append(STOP if generated[seq] >= targets[seq] else rng.randrange(60))
        commit(scheduler, plan, ids)
        steps, tokens = steps + 1, tokens + len(plan.input_ids)
    assert generated == targets
    return steps, tokens


def _workload(shrink: float, groups: int = 48, samples: int = 8):
    """Groups of rows of 16..256 tokens, in a pool that is `shrink` times too small for a batch."""
    rng, batch, block = random.Random(0), 128, 16
    blocks = int(batch * (64 / samples + 136) / block / shrink)
    scheduler = _core.Scheduler(
        _core.KvPool(blocks, block),
        _core.Vocabulary([b"x"] * 64),
        max_batch=batch,
        max_step_tokens=batch + 512,
        max_context=1024,
    )
    rules = scheduler.add_rules(stop_token_ids=[STOP])
    targets = {}
    for prompt_id in range(groups):
        prompt = [rng.randrange(60) for _ in range(64)]
        for seq in scheduler.add_group(prompt, samples, rules, 256, prompt_id=prompt_id):
            targets[seq] = rng.randint(16, 256)
    return scheduler, targets, sum(targets.values()) + 64 * groups


def test_a_pool_three_times_too_small_neither_thrashes_nor_idles():
    scheduler, targets, work = _workload(shrink=3)
    blocks = scheduler.stats()["free_blocks"]
    steps, tokens = _serve(scheduler, targets)
    assert scheduler.stats()["preemptions"] < len(targets) / 3
    assert tokens < 1.12 * work
    block_steps = sum(length * (64 / 8 + length / 2) for length in targets.values()) / 16
    assert steps < 1.5 * block_steps / blocks, "blocks stood empty"


def test_a_pool_that_is_large_enough_preempts_nobody():
    scheduler, targets, work = _workload(shrink=0.5)
    _, tokens = _serve(scheduler, targets)
    assert scheduler.stats()["preemptions"] == 0
    assert tokens < work


@pytest.mark.parametrize(("num_blocks", "rows"), [(9, 1), (10, 2)])
def test_a_prompt_waits_until_there_is_room_for_the_growth_of_the_batch(num_blocks, rows):
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=4, max_context=32)
    for i in (0, 4):  # 4 tokens, and half of 28 more are expected: 5 blocks
        scheduler.add_group(W[i : i + 4], 1, scheduler.add_rules(), 28)
    assert len(step(scheduler, W[0])[0].seqs) == rows


def test_rows_turn_out_shorter_than_feared():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_context=32)
    rules = scheduler.add_rules(stop_token_ids=[W[23]])
    for _ in range(40):
        scheduler.add_group(W[:4], 1, rules, 28)
        step(scheduler, W[23])
    for i in (4, 8, 12):
        scheduler.add_group(W[i : i + 4], 1, rules, 28)
    assert len(step(scheduler, W[0])[0].seqs) == 3


def test_new_prompts_stay_behind_rows_that_lost_their_slot():
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_context=24, max_batch=3)
    rules = scheduler.add_rules()
    seqs = [scheduler.add_group(W[i : i + 4], 1, rules, 12)[0] for i in range(5)]
    preempted_before_new = False
    while (plan := scheduler.plan()) is not None:
        commit(scheduler, plan, [W[0]])
        lost = scheduler.stats()["preemptions"] > 0
        preempted_before_new |= lost and len(scheduler.tokens(seqs[3])["token_ids"]) == 0
        done = [scheduler.tokens(seq)["finish_reason"] != "" for seq in seqs]
        if len(scheduler.tokens(seqs[3])["token_ids"]) > 0:
            assert done[0]
    assert preempted_before_new


@pytest.mark.parametrize("large", [0, 1])
def test_of_groups_begun_together_the_one_with_most_unfinished_rows_gives_first(large):
    scheduler = make_scheduler(num_blocks=18, block_size=4, max_context=64, max_step_tokens=64)
    rules = scheduler.add_rules()
    scheduler.add_group(W[:1], 1, rules, 1)
    step(scheduler, W[0])  # rows are expected to be short, so all are admitted at once
    scheduler.add_group(W[:1], 1, rules, 60)
    groups = [scheduler.add_group(W[8 * i : 8 * i + 7], 3, rules, 60) for i in (1, 0)]
    step(scheduler, *W[:7])
    for seq in groups[1 - large][:2]:  # one row is left of this group
        scheduler.finish(seq, "cancelled")
    before = set(step(scheduler, *W[:5])[0].seqs.tolist())
    assert len(before) == 5
    while before <= (now := set(step(scheduler, *W[:5])[0].seqs.tolist())):
        before = now
    assert groups[large][-1] in before - now
