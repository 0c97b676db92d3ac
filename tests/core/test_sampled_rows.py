"""Temperature schedules, rows without a distribution."""

from __future__ import annotations

import numpy as np
import pytest
from harness import TOKEN_BYTES, W, commit, make_scheduler, step


def _temperatures(scheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        plan, _ = step(scheduler, W[0])
        found += plan.temperatures.tolist()
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ([], [0.5] * 4),
        ([0.25], [0.25] * 4),
        ([2.0, 0.0, 0.125], [2.0, 0.0, 0.125, 0.125]),
        (np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32).tolist(), [1.0, 0.75, 0.5, 0.25]),
    ],
    ids=["none", "one", "shorter-than-the-row", "longer"],
)
def test_the_temperature_of_each_sampled_token(schedule, expected):
    scheduler = make_scheduler()
    scheduler.add_group([1], 1, scheduler.add_rules(), 9, 0.5, temperature_schedule=schedule)
    assert _temperatures(scheduler, 4) == expected


def test_injected_tokens_do_not_advance_the_schedule():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(park_patterns=[b"<q>"])
    (seq,) = scheduler.add_group([1], 1, rules, 9, temperature_schedule=[1.0, 0.5, 0.25])
    plan, _ = step(scheduler, TOKEN_BYTES.index(b"<q>"))
    assert plan.temperatures.tolist() == [1.0]
    scheduler.inject(seq, W[:5])
    assert _temperatures(scheduler, 3) == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("bad", [[-1.0], [1.0, float("nan")], [float("inf")]], ids=str)
def test_a_bad_schedule(bad):
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match="temperature_schedule must be finite and >= 0"):
        scheduler.add_group([1], 1, scheduler.add_rules(), 4, temperature_schedule=bad)
    assert scheduler.plan() is None


def test_a_row_without_a_distribution_ends_and_the_others_go_on():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(banned_token_ids=[3, 4])
    seqs = scheduler.add_group(W[:5], 3, rules, 9)
    step(scheduler, W[0])
    _, (event,) = step(scheduler, W[1], -1, W[2])
    assert (event.seq, event.kind, event.pattern, event.overshoot) == (seqs[1], "finished", -1, 0)
    failed, fine = scheduler.tokens(seqs[1]), scheduler.tokens(seqs[2])
    assert failed["finish_reason"] == "error"
    assert failed["token_ids"].tolist() == [W[0]]
    assert failed["ban_positions"].tolist() == [0, 0]
    assert fine["token_ids"].tolist() == [W[0], W[2]]
    assert fine["ban_positions"].tolist() == [0, 0, 1, 1]
    plan, _ = step(scheduler, W[0])
    assert plan.seqs.tolist() == [seqs[0], seqs[2]]


def test_a_whole_group_without_a_distribution():
    scheduler = make_scheduler()
    seqs = scheduler.add_group(W[:5], 3, scheduler.add_rules(banned_token_ids=[3]), 9)
    plan, events = step(scheduler, -1)
    assert plan.ban_ids.tolist() == [3, 3, 3]
    assert [event.seq for event in events] == seqs
    assert all(scheduler.tokens(seq)["finish_reason"] == "error" for seq in seqs)
    assert all(len(scheduler.tokens(seq)["ban_ids"]) == 0 for seq in seqs)
    assert scheduler.stats()["free_blocks"] == 64
    assert scheduler.plan() is None


def test_bans_of_other_ids_before_the_failed_position_stay():
    scheduler = make_scheduler()
    rules = scheduler.add_rules(banned_patterns=[b"<q>"], banned_token_ids=[W[9]])
    (seq,) = scheduler.add_group([1], 1, rules, 9)
    step(scheduler, TOKEN_BYTES.index(b"<q"))
    plan = scheduler.plan()
    assert len(plan.ban_ids) > 1
    commit(scheduler, plan, [-1])
    assert set(scheduler.tokens(seq)["ban_positions"].tolist()) == {0}
