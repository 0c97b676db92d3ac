"""Runs of decoding siblings whose tables begin with the same blocks."""

from __future__ import annotations

import numpy as np
from harness import TOKEN_BYTES, W, make_scheduler, step

TAG = TOKEN_BYTES.index(b"<q>")


def _spans(plan) -> list[tuple[int, int, int]]:
    """(first segment, segments, tokens) of every span."""
    spans = plan.shared_spans.tolist()
    return [(*span, n) for span, n in zip(spans, plan.shared_lens.tolist(), strict=True)]


def test_siblings_share_the_full_blocks_of_their_prompt():
    scheduler = make_scheduler(block_size=4, max_step_tokens=64)
    rules = scheduler.add_rules()
    scheduler.add_group(W[:11], 3, rules, 9)
    scheduler.add_group(W[11:14], 2, rules, 9)  # no full block
    scheduler.add_group(W[14:18], 2, rules, 9)
    plan, _ = step(scheduler, *W[:7])
    assert _spans(plan) == []
    assert (plan.max_q_len, plan.max_kv_len) == (11, 11)
    plan, _ = step(scheduler, *W[:7])
    assert _spans(plan) == [(0, 3, 8), (5, 2, 4)]
    assert (plan.max_q_len, plan.max_kv_len) == (1, 12)


def test_equal_text_behind_the_prompt_is_shared_too():
    scheduler = make_scheduler(block_size=4)
    scheduler.add_group(W[:4], 2, scheduler.add_rules(), 20)
    for _ in range(5):
        plan, _ = step(scheduler, W[5])
    assert _spans(plan) == [(0, 2, 4)]
    plan, _ = step(scheduler, W[5], W[6])
    assert _spans(plan) == [(0, 2, 8)]
    plan, _ = step(scheduler, W[5], W[6])
    assert _spans(plan) == [(0, 2, 8)]


def test_groups_of_one_prompt_have_spans_of_their_own():
    scheduler = make_scheduler(block_size=4, max_step_tokens=64)
    rules = scheduler.add_rules()
    for _ in range(2):
        scheduler.add_group(W[:9], 2, rules, 9)
    step(scheduler, *W[:4])
    plan, _ = step(scheduler, *W[:4])
    assert _spans(plan) == [(0, 2, 8), (2, 2, 8)]


def test_a_resumed_row_stands_beside_its_siblings():
    scheduler = make_scheduler(block_size=4, max_step_tokens=64)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    first, parked, third = scheduler.add_group(W[:8], 3, rules, 9)
    (other,) = scheduler.add_group(W[9:12], 1, rules, 9)
    step(scheduler, W[0], TAG, W[1], W[2])
    plan, _ = step(scheduler, *W[3:6])
    assert plan.seqs.tolist() == [first, third, other]
    assert _spans(plan) == [(0, 2, 8)]
    scheduler.inject(parked, [])  # one token to compute: it decodes
    plan, _ = step(scheduler, *W[3:7])
    assert plan.seqs.tolist() == [first, parked, third, other]
    assert _spans(plan) == [(0, 3, 8)]


def test_a_row_that_computes_more_than_one_token_stands_behind_those_that_decode():
    scheduler = make_scheduler(block_size=4, max_step_tokens=64)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    parked, second, third = scheduler.add_group(W[:8], 3, rules, 9)
    step(scheduler, TAG, W[1], W[2])
    scheduler.inject(parked, [W[5]])
    plan, _ = step(scheduler, *W[3:6])
    assert plan.seqs.tolist() == [second, third, parked]
    assert np.diff(plan.cu_q).tolist() == [1, 1, 2]
    assert _spans(plan) == [(0, 2, 8)]


def test_a_row_that_computed_its_prompt_again_shares_nothing_without_the_cache():
    scheduler = make_scheduler(block_size=4, num_blocks=10, max_context=40, prefix_cache=False)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    seqs = scheduler.add_group(W[:9], 2, rules, 30)
    step(scheduler, TAG)
    scheduler.add_group(np.resize(W, 39).tolist(), 1, rules, 1)  # takes all blocks
    while scheduler.stats()["running"] + scheduler.stats()["waiting"]:
        step(scheduler, W[0])
    for seq in seqs:
        scheduler.inject(seq, [W[1]])
    while scheduler.stats()["prefill_tokens"] < 9 + 39 + 2 * 11:
        step(scheduler, W[2])
    plan, _ = step(scheduler, W[2])
    assert plan.seqs.tolist() == seqs
    assert _spans(plan) == []
