"""The rules of the scheduler, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from harness import TOKEN_BYTES, Harness, Shape, W, commit, make_scheduler, step
from twin_decoder import TwinRules

PLAIN = TwinRules()


def _parked(scheduler, prompt=(1, 2, 3), max_tokens=8, n=1):
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    seqs = scheduler.add_group(list(prompt), n, rules, max_tokens)
    _, events = step(scheduler, TOKEN_BYTES.index(b"<q>"))
    assert [event.kind for event in events] == ["parked"] * n
    return seqs


def test_a_group_prefills_its_prompt_once_and_copies_the_partial_block():
    scheduler = make_scheduler(block_size=4)
    rules = scheduler.add_rules()
    seqs = scheduler.add_group(W[:10], 4, rules, 5)
    plan, _ = step(scheduler, *W[:4])
    assert plan.input_ids.tolist() == W[:10]
    assert plan.logits_rows.tolist() == [9]
    assert plan.sample_rows.tolist() == [0, 0, 0, 0]
    assert plan.sample_seqs.tolist() == seqs
    assert len(set(plan.uniforms.tolist())) == 4
    assert scheduler.stats()["free_blocks"] == 64 - 3
    plan, _ = step(scheduler, *W[:4])
    assert plan.copies.shape == (3, 2)
    assert set(plan.copies[:, 0]) == {plan.block_tables[3, 2]}
    assert (plan.block_tables[:, :2] == plan.block_tables[0, :2]).all()
    assert len(set(plan.block_tables[:, 2])) == 4
    stats = scheduler.stats()
    assert (stats["prefill_tokens"], stats["decode_tokens"]) == (10, 4)
    assert (stats["shared_blocks"], stats["copied_blocks"]) == (9, 3)
    assert stats["free_blocks"] == 64 - 2 - 4


def test_a_full_prompt_block_needs_no_copy():
    scheduler = make_scheduler(block_size=4)
    scheduler.add_group(W[:8], 3, scheduler.add_rules(), 5)
    step(scheduler, W[0])
    plan, _ = step(scheduler, W[0])
    assert plan.copies.shape == (0, 2)
    assert plan.slots.tolist() == [4 * block for block in plan.block_tables[:, 2]]


def test_the_arrays_of_a_plan_have_the_promised_types():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(banned_token_ids=[7, 3, 7])
    scheduler.add_group([1, 2], 2, rules, 5, temperature=0.5, top_k=9, top_p=0.75, min_p=0.25)
    plan = scheduler.plan()
    types = {
        "int64": ["input_ids", "positions", "slots", "logits_rows"],
        "int32": ["seqs", "cu_q", "kv_lens", "block_tables", "copies", "sample_rows", "top_ks"],
        "float32": ["uniforms", "temperatures", "top_ps", "min_ps"],
    }
    types["int32"] += ["sample_seqs", "ban_rows", "ban_ids"]
    for dtype, names in types.items():
        assert {getattr(plan, name).dtype.name for name in names} == {dtype}
    assert plan.cu_q.tolist() == [0, 2]
    assert plan.kv_lens.tolist() == [2]
    assert plan.temperatures.tolist() == [0.5, 0.5]
    assert plan.top_ks.tolist() == [9, 9]
    assert plan.top_ps.tolist() == [0.75, 0.75]
    assert plan.min_ps.tolist() == [0.25, 0.25]
    assert plan.ban_rows.tolist() == [0, 0, 1, 1]
    assert plan.ban_ids.tolist() == [3, 7, 3, 7]


def test_arrays_outlive_their_plan_and_scheduler():
    scheduler = make_scheduler()
    scheduler.add_group(W[:9], 1, scheduler.add_rules(), 5)
    ids = scheduler.plan().input_ids
    del scheduler
    assert ids.tolist() == W[:9]


def test_prompts_are_cut_to_the_budget_and_decode_rows_always_run():
    scheduler = make_scheduler(max_step_tokens=6, block_size=4)
    rules = scheduler.add_rules()
    scheduler.add_group(W[:2], 2, rules, 30)
    step(scheduler, W[0])
    long = scheduler.add_group(W[:11], 1, rules, 30)[0]
    for chunk in (4, 4, 3):
        plan, _ = step(scheduler, W[0])
        assert plan.seqs.tolist() == [0, 1, long]
        assert np.diff(plan.cu_q).tolist() == [1, 1, chunk]
        assert (long in plan.sample_seqs) == (chunk == 3)


def test_an_injection_goes_before_a_new_prompt_in_one_extend_chunk():
    scheduler = make_scheduler(max_step_tokens=6)
    (seq,) = _parked(scheduler)
    other = scheduler.add_group(W[:9], 1, scheduler.add_rules(), 4)[0]
    assert scheduler.stats()["running"] == 0
    assert scheduler.inject(seq, [W[5], W[6]])
    plan, _ = step(scheduler, W[0])
    assert plan.seqs.tolist() == [seq, other]
    assert plan.input_ids[:3].tolist() == [TOKEN_BYTES.index(b"<q>"), W[5], W[6]]
    assert plan.positions[:3].tolist() == [3, 4, 5]
    record = scheduler.tokens(seq)
    assert record["mask"].tolist() == [1, 0, 0, 1]
    assert record["logprobs"].tolist() == [-0.5, 0.0, 0.0, -0.5]
    assert record["token_ids"].tolist() == [TOKEN_BYTES.index(b"<q>"), W[5], W[6], W[0]]


def test_parked_rows_leave_their_slots_to_others():
    scheduler = make_scheduler(max_batch=2)
    _parked(scheduler, n=2)
    others = scheduler.add_group(W[:3], 2, scheduler.add_rules(), 4)
    step(scheduler, W[0])
    plan, _ = step(scheduler, W[0])
    assert plan.seqs.tolist() == others
    assert scheduler.stats()["parked"] == 2


def test_a_group_larger_than_the_batch_takes_turns():
    scheduler = make_scheduler(max_batch=2)
    seqs = scheduler.add_group(W[:5], 5, scheduler.add_rules(), 3)
    plan, _ = step(scheduler, W[0])
    assert len(plan.sample_rows) == 5
    while (plan := scheduler.plan()) is not None:
        assert len(plan.seqs) <= 2
        commit(scheduler, plan, [W[0]])
    assert all(len(scheduler.tokens(seq)["token_ids"]) == 3 for seq in seqs)


def test_parked_kv_goes_tail_first_and_only_the_missing_part_is_prefilled_again():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24)
    (seq,) = _parked(scheduler, prompt=W[:15])
    rules = scheduler.add_rules()
    other = scheduler.add_group(W[12:23], 1, rules, 2)[0]
    for _ in range(2):
        step(scheduler, W[0])
    assert scheduler.tokens(other)["finish_reason"] == "length"
    assert scheduler.stats()["preemptions"] == 0
    assert scheduler.inject(seq, [W[1]])
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [12, 13, 14, 15, 16]


def test_the_last_parked_row_gives_its_blocks_first():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24)
    (first,), (last,) = _parked(scheduler, W[:7]), _parked(scheduler, W[5:12])
    scheduler.add_group(W[12:23], 1, scheduler.add_rules(), 1)
    step(scheduler, W[0])
    scheduler.inject(last, [W[1]])
    scheduler.inject(first, [W[1]])
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [7, 8, 4, 5, 6, 7, 8]


def test_blocks_with_other_owners_go_last():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_context=24)
    (alone,), (_, member) = _parked(scheduler, W[:7]), _parked(scheduler, W[4:12], n=2)
    scheduler.add_group(W[12:23], 1, scheduler.add_rules(), 1)
    step(scheduler, W[0])
    scheduler.inject(alone, [W[1]])
    scheduler.inject(member, [W[1]])
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [4, 5, 6, 7, 8, 8, 9]


def test_the_newest_row_is_preempted_first():
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_context=24)
    rules = scheduler.add_rules()
    seqs = [scheduler.add_group(W[i : i + 4], 1, rules, 12)[0] for i in range(3)]
    seen = []
    while (plan := scheduler.plan()) is not None:
        seen.append(plan.seqs.tolist())
        commit(scheduler, plan, [W[0]])
    turns = [rows for i, rows in enumerate(seen) if i == 0 or rows != seen[i - 1]]
    assert turns[:2] == [seqs, seqs[:2]]
    assert [rows[0] for rows in seen] == sorted(rows[0] for rows in seen)
    assert all(scheduler.tokens(seq)["finish_reason"] == "length" for seq in seqs)


def test_injected_rows_go_before_others_that_wait_for_a_slot():
    scheduler = make_scheduler(max_batch=2)
    (running,) = scheduler.add_group(W[:3], 1, scheduler.add_rules(), 9)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    leader, waiting, injected = scheduler.add_group([1, 2], 3, rules, 9)
    step(scheduler, *W[:3], TOKEN_BYTES.index(b"<q>"))
    scheduler.finish(leader, "cancelled")
    scheduler.inject(injected, [W[0]])
    assert step(scheduler, W[0])[0].seqs.tolist() == [running, injected]
    scheduler.finish(running, "cancelled")
    assert step(scheduler, W[0])[0].seqs.tolist() == [waiting, injected]


def _run(scheduler, token: int):
    plans = []
    while (plan := scheduler.plan()) is not None:
        plans.append(plan)
        commit(scheduler, plan, [token])
        scheduler.check()
    return plans


def test_a_row_that_lost_its_slot_inside_the_prompt_goes_on_there():
    scheduler = make_scheduler(num_blocks=9, block_size=2, max_batch=2, max_step_tokens=3)
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    (old,) = scheduler.add_group(W[:1], 1, rules, 2)
    first, second = scheduler.add_group(W[:8], 2, rules, 2)
    _run(scheduler, TOKEN_BYTES.index(b"<q>"))
    scheduler.add_group(W[7:24], 1, rules, 1)  # takes all blocks of the three parked rows
    _run(scheduler, W[0])
    scheduler.inject(second, [W[1]])
    assert step(scheduler)[0].positions.tolist() == [0, 1, 2]
    scheduler.inject(first, [W[1]])
    step(scheduler)
    step(scheduler)
    scheduler.inject(old, [W[1]])
    assert step(scheduler, W[0])[0].seqs.tolist() == [old]
    plans = _run(scheduler, W[0])
    assert plans[0].seqs.tolist() == [first]
    resumed = next(plan for plan in plans if second in plan.seqs)
    assert resumed.positions.tolist() == [3, 4, 5]


def test_a_preempted_row_takes_its_prompt_from_a_sibling():
    harness = Harness(Shape(num_blocks=7, block_size=2, max_context=12))
    harness.add(W[:6], 2, PLAIN, max_tokens=6, prompt_id=0)
    prefilled = []
    while (before := harness.scheduler.stats()) and harness.step() is not None:
        prefilled.append(harness.scheduler.stats()["prefill_tokens"] - before["prefill_tokens"])
    assert harness.scheduler.stats()["preemptions"] > 0
    assert prefilled[0] == 6
    assert all(tokens < 6 for tokens in prefilled[1:])


@pytest.mark.parametrize(
    ("rules", "token", "event"),
    [
        ({"stop_token_ids": [W[3]]}, b"w3", ("finished", -1, 0)),
        ({"stop_patterns": [b"zz", b"</q"]}, b"x</q>y", ("finished", 1, 2)),
        ({"stop_patterns": [b"zz"], "park_patterns": [b"x", b"y"]}, b"x</q>y", ("parked", 0, 5)),
        ({"stop_token_ids": [11], "park_patterns": [b"</q>"]}, b"x</q>y", ("finished", -1, 0)),
    ],
    ids=["stop-token", "stop-pattern", "first-park-pattern", "stop-token-before-pattern"],
)
def test_events_name_kind_pattern_and_overshoot(rules, token, event):
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(**rules), 1)
    _, (got,) = step(scheduler, TOKEN_BYTES.index(token))
    assert (got.seq, got.kind, got.pattern, got.overshoot) == (seq, *event)
    assert scheduler.tokens(seq)["token_ids"].tolist() == [TOKEN_BYTES.index(token)]
    assert scheduler.tokens(seq)["finish_reason"] == ("stop" if got.kind == "finished" else "")
    assert f"kind='{got.kind}'" in repr(got)


def test_a_context_that_is_full_ends_the_row():
    scheduler = make_scheduler(max_context=5)
    (seq,) = scheduler.add_group([1, 2, 3], 1, scheduler.add_rules(), 100)
    step(scheduler, W[0])
    _, (event,) = step(scheduler, W[0])
    assert event.kind == "finished"
    assert scheduler.tokens(seq)["finish_reason"] == "length"
    assert scheduler.stats()["free_blocks"] == 64


@pytest.mark.parametrize(
    ("max_tokens", "ids"), [(1, []), (5, W[:4])], ids=["no-tokens-left", "context-exceeded"]
)
def test_an_injection_without_room_ends_the_row(max_tokens, ids):
    scheduler = make_scheduler(max_context=8)
    (seq,) = _parked(scheduler, max_tokens=max_tokens)
    assert scheduler.inject(seq, ids) is False
    assert scheduler.tokens(seq)["finish_reason"] == "length"
    assert len(scheduler.tokens(seq)["token_ids"]) == 1
    assert scheduler.plan() is None


def test_an_injection_that_just_fits_leaves_one_token():
    scheduler = make_scheduler(max_context=8)
    (seq,) = _parked(scheduler)
    assert scheduler.inject(seq, W[:3])
    _, (event,) = step(scheduler, W[0])
    assert event.kind == "finished"
    assert scheduler.tokens(seq)["finish_reason"] == "length"


def test_a_banned_string_cannot_be_completed_over_several_tokens():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(banned_patterns=[b"<q>"], banned_token_ids=[W[9]])
    scheduler.add_group([1], 1, rules, 9)
    banned = []
    for piece in (b"<", b"q", b"a"):
        plan, _ = step(scheduler, TOKEN_BYTES.index(piece))
        banned.append({TOKEN_BYTES[i] for i in plan.ban_ids} - {b"<q>", b"w9"})
    assert banned == [set(), {b"q>"}, {b">"}]


def test_bans_start_anew_behind_an_injection():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(banned_patterns=[b"<q>"], park_patterns=[b"<"])
    (seq,) = scheduler.add_group([1], 1, rules, 9)
    step(scheduler, TOKEN_BYTES.index(b"<"))
    scheduler.inject(seq, [TOKEN_BYTES.index(b"<")])
    assert {TOKEN_BYTES[i] for i in scheduler.plan().ban_ids} == {b"<q>"}


def test_new_rules_see_the_tokens_since_the_last_injection():
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(), 9)
    step(scheduler, TOKEN_BYTES.index(b"<"))
    scheduler.set_rules(seq, scheduler.add_rules(stop_patterns=[b"<q>"]))
    _, (event,) = step(scheduler, TOKEN_BYTES.index(b"q>"))
    assert (event.kind, event.pattern) == ("finished", 0)


def test_new_rules_do_not_see_injected_tokens():
    scheduler = make_scheduler()
    (seq,) = _parked(scheduler)
    scheduler.inject(seq, [TOKEN_BYTES.index(b"<")])
    scheduler.set_rules(seq, scheduler.add_rules(stop_patterns=[b"<q>"]))
    _, events = step(scheduler, TOKEN_BYTES.index(b"q>"))
    assert events == []


def test_equal_rules_have_equal_ids():
    scheduler = make_scheduler()
    first = scheduler.add_rules([1], [b"a"])
    assert scheduler.add_rules([2], [b"a"]) != first
    assert scheduler.add_rules([1], [b"a"]) == first


def test_finishing_the_first_member_leaves_the_prompt_to_the_next():
    scheduler = make_scheduler(max_step_tokens=4)
    seqs = scheduler.add_group(W[:6], 3, scheduler.add_rules(), 4)
    step(scheduler)
    scheduler.finish(seqs[0], "cancelled")
    scheduler.check()
    plan, _ = step(scheduler, W[0])
    assert plan.positions.tolist() == [4, 5]
    assert plan.sample_seqs.tolist() == seqs[1:]
    assert scheduler.tokens(seqs[0])["finish_reason"] == "cancelled"


def test_uniforms_skip_injected_positions():
    harness = Harness(Shape())
    (seq,) = harness.add(
        [1], 1, TwinRules(park_patterns=(b"w", b"<", b"q")), max_tokens=9, prompt_id=4
    )
    while not harness.rows("parked"):
        harness.step()
    harness.inject(seq, W[:3])
    expected = harness.expected_uniform(seq)
    assert harness.scheduler.plan().uniforms.tolist() == [expected]
