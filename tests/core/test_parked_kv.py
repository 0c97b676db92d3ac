"""Which parked rows keep their KV, which lose it, and what goes to the host instead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from harness import TOKEN_BYTES, Harness, Shape, W, commit, make_scheduler, step
from twin_decoder import TwinRules

TAG = TOKEN_BYTES.index(b"<q>")
PARKS = TwinRules(park_patterns=(b"q>", b"<q", b"w1", b"a"))


def _parked(scheduler, prompt):
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    (seq,) = scheduler.add_group(list(prompt), 1, rules, 8)
    step(scheduler, TAG)
    return seq


def _recomputed(scheduler, seq) -> int:
    """Tokens that the parked row computes again when it resumes."""
    scheduler.inject(seq, [W[0]])
    before = scheduler.stats()["prefill_tokens"]
    step(scheduler, W[0])
    return scheduler.stats()["prefill_tokens"] - before - 2


def _three_parked(**shape):
    scheduler = make_scheduler(num_blocks=9, block_size=4, max_context=36, **shape)
    return scheduler, [_parked(scheduler, W[7 * i : 7 * i + 7]) for i in range(3)]


def _newcomer(scheduler, tokens: int) -> None:
    """A prompt that is computed and ends at once."""
    prompt = np.resize(W[21:24], tokens).tolist()
    scheduler.add_group(prompt, 1, scheduler.add_rules(), 1)
    step(scheduler, W[0])


@pytest.mark.parametrize("longest", [0, 1, 2])
def test_the_longest_expected_wait_gives_first(longest):
    scheduler, seqs = _three_parked()
    for at, seq in enumerate(seqs):
        scheduler.expect_wait(seq, 9.0 if at == longest else 3.0)
    _newcomer(scheduler, 16)
    assert [_recomputed(scheduler, seq) for seq in seqs] == [3 * (at == longest) for at in range(3)]


def test_of_equal_waits_the_row_parked_last_gives_first():
    scheduler, seqs = _three_parked()
    _newcomer(scheduler, 16)
    assert [_recomputed(scheduler, seq) for seq in seqs] == [0, 0, 3]


def test_an_unknown_wait_is_longer_than_any():
    scheduler, seqs = _three_parked()
    scheduler.expect_wait(seqs[1], 1e9)
    scheduler.expect_wait(seqs[2], 1e9)
    _newcomer(scheduler, 16)
    assert [_recomputed(scheduler, seq) for seq in seqs] == [3, 0, 0]


def test_a_new_park_forgets_the_wait():
    scheduler, seqs = _three_parked()
    for seq in seqs:
        scheduler.expect_wait(seq, 5.0)
    scheduler.inject(seqs[0], [])
    step(scheduler, TAG)
    _newcomer(scheduler, 14)
    assert [_recomputed(scheduler, seq) for seq in seqs][1:] == [0, 0]


def _half_full_batch(rate: float | None, wait: float):
    """A parked row, a batch that is half full, and a prompt that needs the parked row's blocks."""
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_context=32, max_batch=2)
    seq = _parked(scheduler, W[:15])
    if rate is not None:
        scheduler.set_prefill_rate(rate)
    scheduler.expect_wait(seq, wait)
    rules = scheduler.add_rules()
    for prompt in (W[16:20], W[20:24]):
        scheduler.add_group(prompt, 1, rules, 12)
    plan, _ = step(scheduler, W[0])
    return scheduler, seq, plan.seqs.tolist()


@pytest.mark.parametrize(
    ("rate", "wait", "kept"),
    [
        (None, math.inf, True),
        (16.0, 1.9, True),
        (16.0, 2.0, False),
        (16.0, math.inf, False),
        (1e-6, 1e6, True),
    ],
    ids=["rate-unknown", "short-wait", "as-long-as-prefilling-the-pool", "wait-unknown", "slow"],
)
def test_new_work_displaces_only_those_that_wait_longer_than_prefilling_the_pool(rate, wait, kept):
    scheduler, seq, planned = _half_full_batch(rate, wait)
    assert len(planned) == (1 if kept else 2)
    assert scheduler.stats()["parked"] == 1
    while scheduler.stats()["waiting"] + scheduler.stats()["running"] > 1:
        step(scheduler, W[0])
    assert scheduler.tokens(seq)["finish_reason"] == ""


def test_running_rows_displace_kept_ones():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24)
    seq = _parked(scheduler, W[:15])
    scheduler.expect_wait(seq, 0.0)
    scheduler.add_group(W[16:20], 1, scheduler.add_rules(), 12)
    for _ in range(12):
        step(scheduler, W[0])
    assert scheduler.stats()["preemptions"] == 0
    assert _recomputed(scheduler, seq) == 7


def test_what_could_not_help_is_not_dropped():
    scheduler, seqs = _three_parked()
    rules = scheduler.add_rules()
    scheduler.add_group(W[21:24], 1, rules, 30)
    step(scheduler, W[0])
    free = scheduler.stats()["free_blocks"]
    scheduler.add_group(np.resize(W, 33).tolist(), 1, rules, 1)  # fits only an empty pool
    step(scheduler, W[0])
    assert scheduler.stats()["free_blocks"] == free
    assert _recomputed(scheduler, seqs[-1]) == 0


def test_evicted_tails_go_to_the_host_and_come_back():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24, host_blocks=3)
    seq = _parked(scheduler, W[:15])
    scheduler.add_group(W[16:24] + W[16:19], 1, scheduler.add_rules(), 1)
    plan, _ = step(scheduler, W[0])
    assert plan.swap_out.tolist() == [[3, 0]]
    assert plan.swap_in.shape == (0, 2)
    assert scheduler.stats()["free_host_blocks"] == 2
    scheduler.inject(seq, [W[1]])
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [15, 16]
    assert plan.swap_in.tolist() == [[0, plan.block_tables[0, 3]]]
    stats = scheduler.stats()
    assert (stats["swapped_out_blocks"], stats["swapped_in_blocks"]) == (1, 1)
    assert stats["free_host_blocks"] == 3


def test_a_prefix_hit_serves_instead_of_the_host():
    shape = {"num_blocks": 12, "block_size": 4, "max_context": 48, "max_step_tokens": 48}
    scheduler = make_scheduler(**shape, host_blocks=8)
    prompt = W[:16]
    seq = _parked(scheduler, prompt)
    _newcomer(scheduler, 41)
    assert scheduler.stats()["swapped_out_blocks"] == 3
    scheduler.add_group([*prompt, W[3]], 1, scheduler.add_rules(), 1)
    step(scheduler, W[0])
    scheduler.inject(seq, [W[1]])
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [16, 17]
    assert plan.swap_in.shape == (0, 2)
    assert scheduler.stats()["free_host_blocks"] == 8


@pytest.mark.parametrize("end", ["finish", "release", "clear"])
def test_host_blocks_are_free_when_their_row_ends(end):
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24, host_blocks=3)
    seq = _parked(scheduler, W[:15])
    scheduler.add_group(W[:0] + W[13:24], 1, scheduler.add_rules(), 1)
    step(scheduler, W[0])
    assert scheduler.stats()["free_host_blocks"] < 3
    arguments = {"finish": (seq, "cancelled"), "release": (seq,), "clear": ()}[end]
    getattr(scheduler, end)(*arguments)
    assert scheduler.stats()["free_host_blocks"] == 3
    assert scheduler.stats()["free_blocks"] == 6


def test_without_a_free_host_block_the_tail_is_dropped():
    shape = {"num_blocks": 6, "block_size": 4, "max_context": 24, "max_step_tokens": 24}
    scheduler = make_scheduler(**shape, host_blocks=1)
    seq = _parked(scheduler, W[:19])
    _newcomer(scheduler, 11)
    stats = scheduler.stats()
    assert (stats["swapped_out_blocks"], stats["free_host_blocks"]) == (1, 0)
    scheduler.inject(seq, [W[1]])
    first, _ = step(scheduler, W[0])
    assert first.positions.tolist() == [12, 13, 14, 15]  # the dropped block, then the swapped one
    second, _ = step(scheduler, W[0])
    assert len(second.swap_in) == 1
    assert second.positions.tolist() == [19, 20]


def test_a_prompt_of_parked_siblings_goes_to_the_host_once():
    shape = {"num_blocks": 6, "block_size": 4, "max_context": 24, "max_step_tokens": 24}
    scheduler = make_scheduler(**shape, host_blocks=6)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    seqs = scheduler.add_group(W[:8], 2, rules, 8)
    step(scheduler, TAG)
    _newcomer(scheduler, 23)
    assert scheduler.stats()["swapped_out_blocks"] == 2
    for seq in seqs:  # the one brings the prompt back, the other one finds it
        scheduler.inject(seq, [W[1]])
        plan, _ = step(scheduler, W[0])
        assert plan.positions.tolist()[-2:] == [8, 9]
    assert scheduler.stats()["swapped_in_blocks"] == 2


def test_a_block_that_is_copied_stays_until_the_copy_is_made():
    scheduler = make_scheduler(num_blocks=3, block_size=4, max_context=12)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    (first, longest), (second, other) = (
        scheduler.add_group(W[i : i + 2], 2, rules, 2) for i in (0, 4)
    )
    step(scheduler, W[0], TAG, W[0], TAG)
    scheduler.expect_wait(other, 1.0)
    plan = scheduler.plan()  # the first copy takes the last free block
    assert plan.seqs.tolist() == [first, second]
    assert len(plan.copies) == 1
    scheduler.check()
    commit(scheduler, plan, [W[0]])
    scheduler.check()
    scheduler.inject(longest, [])
    assert step(scheduler, W[0])[0].positions.tolist() == [2], "nothing of it was taken"


def test_rows_with_random_waits_finish_through_a_small_pool_and_a_smaller_host():
    rng = np.random.default_rng(3)
    harness = Harness(Shape(num_blocks=40, host_blocks=16, max_batch=16, max_step_tokens=64))
    for prompt_id in range(40):
        prompt = rng.integers(0, len(TOKEN_BYTES), 11).tolist()
        harness.add(prompt, 4, PARKS, max_tokens=20, prompt_id=prompt_id)
    harness.scheduler.set_prefill_rate(40.0)
    while harness.step() is not None or harness.rows("parked"):
        parked = harness.rows("parked")
        for seq in parked:
            if rng.random() < 0.2 or len(parked) == len(harness.rows("runnable") + parked):
                harness.inject(seq, rng.integers(0, 30, rng.integers(0, 7)).tolist())
            else:
                harness.scheduler.expect_wait(seq, rng.uniform(0, 9))
    assert not harness.rows("runnable")
    stats = harness.scheduler.stats()
    assert stats["swapped_in_blocks"] > 0
    assert stats["free_host_blocks"] == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("expect_wait", 0, -1.0), "seconds must be >= 0"),
        (("expect_wait", 0, math.nan), "seconds must be >= 0"),
        (("expect_wait", 1, 1.0), "not parked"),
        (("expect_wait", 7, 1.0), "unknown"),
        (("set_prefill_rate", 0.0), "finite and > 0"),
        (("set_prefill_rate", math.inf), "finite and > 0"),
    ],
    ids=str,
)
def test_bad_waits_and_rates(call, message):
    scheduler = make_scheduler()
    _parked(scheduler, W[:3])
    scheduler.add_group(W[:3], 1, scheduler.add_rules(), 2)
    name, *arguments = call
    with pytest.raises(ValueError, match=message):
        getattr(scheduler, name)(*arguments)
