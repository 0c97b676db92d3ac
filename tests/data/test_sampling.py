from __future__ import annotations

import json

import pytest

from eapo_fast.data import PromptSampler
from eapo_fast.errors import ConfigError, DataError


def test_an_epoch_visits_no_row_twice_and_drops_leftovers() -> None:
    sampler = PromptSampler(11, 3, seed=5)
    assert sampler.batches_per_epoch == 3
    for epoch in range(4):
        assert sampler.epoch == epoch
        rows = [row for _ in range(3) for row in sampler.next()]
        assert len(set(rows)) == 9
        assert set(rows) <= set(range(11))


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    draws = {}
    for seed in (0, 1, -1, 2**63):
        a, b = PromptSampler(7, 7, seed), PromptSampler(7, 7, seed)
        draws[seed] = [a.next() for _ in range(3)]
        assert draws[seed] == [b.next() for _ in range(3)]
    orders = [tuple(order) for epochs in draws.values() for order in epochs]
    assert len(set(orders)) == len(orders)


def test_the_order_never_changes_between_versions() -> None:
    assert PromptSampler(8, 8, seed=42).next() == GOLDEN


GOLDEN = [7, 1, 6, 4, 3, 5, 0, 2]


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    sampler = PromptSampler(5, 2, seed=0, shuffle=False)
    assert [sampler.next() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("position", range(8))
def test_resume_at_any_position(position: int) -> None:
    straight = PromptSampler(10, 3, seed=9)
    expected = [straight.next() for _ in range(12)]
    first = PromptSampler(10, 3, seed=9)
    for _ in range(position):
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PromptSampler(10, 3, seed=9)
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(12 - position)] == expected[position:]


def test_a_state_of_other_data_is_refused() -> None:
    state = PromptSampler(10, 3, seed=9).state_dict()
    with pytest.raises(DataError, match="num_rows was 10, is 11; seed was 9, is 8"):
        PromptSampler(11, 3, seed=8).load_state_dict(state)


def test_too_few_rows_explains() -> None:
    with pytest.raises(ConfigError, match="has 3 usable prompts, but one batch takes 4"):
        PromptSampler(3, 4, seed=0)
    with pytest.raises(ConfigError, match="batch_prompts: got 0"):
        PromptSampler(3, 0, seed=0)
