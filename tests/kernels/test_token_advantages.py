from __future__ import annotations

import itertools

import pytest
import torch

from eapo_fast import ops

_DOUBLE = torch.float64
_CU = [0, 3, 3, 8, 9, 14]


def _problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(_CU[-1], generator=generator, dtype=_DOUBLE)
    return rewards, torch.rand(_CU[-1], generator=generator) > 0.3


def _returns(rewards, mask, gamma, restart):
    """One token after the other, from the last one of each sequence."""
    found = [0.0] * len(rewards)
    for start, stop in itertools.pairwise(_CU):
        running = 0.0
        for t in reversed(range(start, stop)):
            if mask[t]:
                running = found[t] = rewards[t].item() + gamma * running
            elif restart:
                running = 0.0
    return torch.tensor(found, dtype=_DOUBLE)


@pytest.mark.parametrize("restart", [False, True], ids=["pass over", "restart"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.97, 1.0])
def test_returns_against_a_loop(gamma, restart):
    for seed in range(4):
        rewards, mask = _problem(seed)
        found = ops.token_advantages(
            torch.where(mask, rewards, torch.nan),
            torch.tensor(_CU),
            mask=mask,
            gamma=gamma,
            restart=restart,
        )
        torch.testing.assert_close(found, _returns(rewards, mask, gamma, restart))


def test_a_reward_of_the_sequence_is_earned_at_its_last_policy_token():
    _, mask = _problem(1)
    rewards = torch.tensor([1.0, 9.0, -0.5, 2.0, 0.25], dtype=_DOUBLE)
    last = torch.zeros(_CU[-1], dtype=_DOUBLE)
    for i, (start, stop) in enumerate(itertools.pairwise(_CU)):
        live = [t for t in range(start, stop) if mask[t]]
        if live:
            last[live[-1]] = rewards[i]
    for gamma in (0.9, 1.0):
        given = {"mask": mask, "gamma": gamma}
        found = ops.token_advantages(rewards, torch.tensor(_CU), **given)
        assert torch.equal(found, ops.token_advantages(last, torch.tensor(_CU), **given))
    per_token = rewards.repeat_interleave(torch.tensor(_CU).diff())
    assert torch.equal(found, torch.where(mask, per_token, 0.0))


def test_whitened_over_masked_in_tokens():
    rewards, mask = _problem(2)
    cu = torch.tensor(_CU)
    plain = ops.token_advantages(rewards, cu, mask=mask)[mask]
    found = ops.token_advantages(rewards, cu, mask=mask, whiten=True)
    wanted = (plain - plain.mean()) / (plain.var() + 1e-8).sqrt()
    torch.testing.assert_close(found[mask], wanted)
    assert not found[~mask].any()
    low = ops.token_advantages(rewards.bfloat16(), cu, mask=mask, whiten=True)
    assert low.dtype == torch.float32


def test_expert_tokens_change_nothing():
    """Masked-out rows between and behind the policy's tokens."""
    rewards, _ = _problem(3)
    index = torch.tensor([0, -1, 1, 2, -1, -1, 3, 4, -1, 5, 6, 7, 8, -1, 9, 10, 11, 12, -1, 13])
    cu = torch.tensor([0, 6, 6, 12, 14, 20])
    long = torch.where(index < 0, torch.nan, rewards[index])
    for gamma in (0.9, 1.0):
        short = ops.token_advantages(rewards, torch.tensor(_CU), gamma=gamma, whiten=True)
        found = ops.token_advantages(long, cu, mask=index >= 0, gamma=gamma, whiten=True)
        assert torch.equal(found[index >= 0], short)


@pytest.mark.parametrize("value", [0.7, -1e6])
def test_constant_and_single_tokens_are_zero(value):
    for rows in (1, 5):
        rewards = torch.full((rows,), value)
        cu = torch.arange(rows + 1)
        assert not ops.token_advantages(rewards, cu, whiten=True).any()
    none = ops.token_advantages(torch.ones(2), torch.tensor([0, 1, 3]), mask=torch.zeros(3))
    assert none.tolist() == [0, 0, 0]
    assert ops.token_advantages(torch.ones(0), torch.tensor([0]), whiten=True).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.ones(4)}, r"rewards: got 4 values, allowed is one a sequence \(5\)"),
        ({"cu_seqlens": torch.tensor([0, 9, 3, 14])}, r"cu_seqlens: falls from entry 1 to 2"),
        ({"gamma": 1.5}, r"gamma: got 1.5, allowed is 0 to 1"),
        ({"mask": torch.ones(14, 2)}, r"mask: got shape \[14, 2\]"),
        ({"backend": "cuda"}, r"token_advantages has no 'cuda' implementation"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    rewards, mask = _problem()
    given = {"rewards": rewards, "cu_seqlens": torch.tensor(_CU), "mask": mask}
    with pytest.raises(ValueError, match=message):
        ops.token_advantages(**given | changes)
