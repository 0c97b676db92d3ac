"""What the scheduler refuses, and that a refusal changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from harness import W, commit, make_scheduler


def test_two_plans_in_a_row():
    scheduler = make_scheduler()
    scheduler.add_group([1], 1, scheduler.add_rules(), 4)
    scheduler.plan()
    with pytest.raises(RuntimeError, match="plan\\(\\) was called twice"):
        scheduler.plan()


def test_a_commit_without_a_plan():
    with pytest.raises(RuntimeError, match="without a planned step"):
        make_scheduler().commit(np.zeros(0, np.int64), *[np.zeros(0, np.float32)] * 2)


@pytest.mark.parametrize("tokens", [[], [1, 2], [-2], [2**31]], ids=str)
def test_a_commit_of_other_samples_changes_nothing(tokens):
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(), 4)
    plan = scheduler.plan()
    floats = np.ones(len(tokens), np.float32)
    with pytest.raises(ValueError, match=r"the step has 1 samples|not in \[0, 2\*\*31\)"):
        scheduler.commit(np.array(tokens, np.int64), floats, floats)
    commit(scheduler, plan, [W[0]])
    assert scheduler.tokens(seq)["token_ids"].tolist() == [W[0]]


@pytest.mark.parametrize("action", ["finish", "release", "set_rules"])
def test_planned_rows_are_fixed(action):
    scheduler = make_scheduler()
    seqs = scheduler.add_group([1], 2, scheduler.add_rules(), 4)
    scheduler.plan()
    arguments = {"finish": ("stop",), "release": (), "set_rules": (0,)}[action]
    with pytest.raises(RuntimeError, match="planned step; commit"):
        getattr(scheduler, action)(seqs[1], *arguments)


def test_a_finished_row_cannot_change():
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(), 4)
    scheduler.finish(seq, "cancelled")
    with pytest.raises(ValueError, match="it finished as 'cancelled'"):
        scheduler.inject(seq, [1])


def test_only_parked_rows_take_injections():
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(), 4)
    with pytest.raises(ValueError, match="not parked"):
        scheduler.inject(seq, [1])


def test_a_released_row_is_gone():
    scheduler = make_scheduler()
    (seq,) = scheduler.add_group([1], 1, scheduler.add_rules(), 4)
    scheduler.release(seq)
    with pytest.raises(ValueError, match="sequence 0 is unknown or was released"):
        scheduler.tokens(seq)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [({"max_context": 9}, "max_context=9"), ({"num_blocks": 2}, "2 blocks of 4")],
    ids=["context", "pool"],
)
def test_a_prompt_too_long(shape, limit):
    scheduler = make_scheduler(**shape)
    with pytest.raises(ValueError, match=f"a prompt of 9 tokens and one more .*{limit}"):
        scheduler.add_group(W[:9], 1, scheduler.add_rules(), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be >= 1, got 0"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [-3]}, "token ids must be >= 0, got -3"),
        ({"rules": 1}, "rules 1 are unknown"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 1.5}, "min_p must be in"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
    ],
    ids=str,
)
def test_a_bad_group(change, message):
    scheduler = make_scheduler()
    good = {"prompt": [1], "n": 1, "rules": scheduler.add_rules(), "max_tokens": 4}
    with pytest.raises(ValueError, match=message):
        scheduler.add_group(**(good | change))
    assert scheduler.plan() is None


@pytest.mark.parametrize(
    "name", ["num_blocks", "block_size", "max_batch", "max_step_tokens", "max_context"]
)
def test_a_bad_shape(name):
    with pytest.raises(ValueError, match=f"{name} must be >= "):
        make_scheduler(**{name: 0})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"stop_patterns": [b"a"], "park_patterns": [b"a"]}, "pattern 1 repeats pattern 0"),
        ({"banned_patterns": [b""]}, "pattern 0 is empty"),
        ({"banned_token_ids": [4, -2]}, "banned_token_ids must be >= 0, got -2"),
    ],
    ids=["stop-and-park", "empty", "negative"],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler().add_rules(**rules)
