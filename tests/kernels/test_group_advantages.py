from __future__ import annotations

import pytest
import torch
from policy_oracle import golden_cases

from eapo_fast import ops, recipes

_RECIPE_OF = {
    "grpo.advantage": "grpo",
    "grpo.advantage.degenerate": "grpo",
    "dr_grpo.advantage": "dr_grpo",
    "rloo.advantage": "rloo",
    "opo.advantage": "opo",
}


def _plain(rewards, groups, center, scale, lengths, valid, eps=1e-6, ddof=1):
    """One rollout at a time, in Python floats."""
    live = [i for i, v in enumerate(valid) if v]

    def std(values):
        if len(values) == 1:
            return 1.0
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / (len(values) - ddof)) ** 0.5

    out = [0.0] * len(rewards)
    for i in live:
        peers = [j for j in live if groups[j] == groups[i]]
        others = [j for j in peers if j != i]
        if center == "none" or not others:
            base = 0.0
        elif center == "mean":
            base = sum(rewards[j] for j in peers) / len(peers)
        elif center == "loo":
            base = sum(rewards[j] for j in others) / len(others)
        else:
            base = sum(lengths[j] * rewards[j] for j in peers) / sum(lengths[j] for j in peers)
        by = {"std": peers, "batch_std": live, "none": None}[scale]
        divisor = 1.0 if by is None else std([rewards[j] for j in by]) + eps
        out[i] = (rewards[i] - base) / divisor
    return out


@pytest.mark.parametrize("case", golden_cases(*_RECIPE_OF), ids=lambda c: c["method"])
def test_published_values(case):
    recipe, inputs = recipes.get(_RECIPE_OF[case["method"]]), case["inputs"]
    rewards = torch.tensor(inputs["reward"], dtype=torch.float64)
    lengths = inputs.get("length")
    got = ops.group_advantages(
        rewards,
        torch.tensor(inputs.get("group", [0] * len(rewards))),
        center=recipe.center,
        scale=recipe.scale,
        lengths=None if lengths is None else torch.tensor(lengths).long(),
        eps=recipe.advantage_eps,
        ddof=recipe.ddof,
    )
    expected = torch.tensor(case["expected"]["advantage"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=case["tolerance"])


@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
@pytest.mark.parametrize("center", ["mean", "loo", "length", "none"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 1e-4)],
    ids=["reference", "cpu"],
)
def test_against_plain_python(backend, dtype, tolerance, center, scale):
    generator = torch.Generator().manual_seed(5)
    groups = torch.tensor([7, -3, 7, 7, 40, -3, 7, 11, -3, 40, 7])
    rewards = torch.rand(11, generator=generator, dtype=dtype)
    lengths = torch.randint(1, 90, (11,), generator=generator)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1]).bool()
    for ddof in (0, 1):
        got = ops.group_advantages(
            rewards, groups, center=center, scale=scale, lengths=lengths, valid=valid, ddof=ddof,
            backend=backend,
        )  # fmt: skip
        expected = _plain(
            rewards.tolist(), groups.tolist(), center, scale, lengths.tolist(), valid, ddof=ddof
        )
        assert got.dtype == dtype
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("center", ["mean", "loo", "length"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_constant_group_is_exactly_zero(backend, center):
    rewards = torch.tensor([0.1] * 3 + [1 / 3] * 7)
    groups = torch.tensor([0] * 3 + [1] * 7)
    lengths = torch.arange(1, 11)
    got = ops.group_advantages(rewards, groups, center=center, lengths=lengths, backend=backend)
    assert torch.equal(got, torch.zeros(10))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_invalid_rollouts_do_not_count_whatever_they_hold(backend):
    rewards = torch.tensor([1.0, float("nan"), 0.0, 0.5, float("inf")])
    groups = torch.zeros(5, dtype=torch.long)
    valid = torch.tensor([1, 0, 1, 1, 0])
    got = ops.group_advantages(rewards, groups, valid=valid, backend=backend)
    alone = ops.group_advantages(rewards[[0, 2, 3]], groups[:3], backend=backend)
    torch.testing.assert_close(got, torch.tensor([alone[0], 0.0, alone[1], alone[2], 0.0]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_rollouts_and_no_valid_rollouts(backend):
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert ops.group_advantages(*empty, backend=backend).shape == (0,)
    none_valid = ops.group_advantages(
        torch.ones(3), torch.zeros(3).long(), valid=torch.zeros(3).bool(), backend=backend
    )
    assert torch.equal(none_valid, torch.zeros(3))


def test_order_of_rollouts_does_not_matter():
    generator = torch.Generator().manual_seed(9)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    groups = torch.arange(24) % 5
    order = torch.randperm(24, generator=generator)
    torch.testing.assert_close(
        ops.group_advantages(rewards[order], groups[order]),
        ops.group_advantages(rewards, groups)[order],
    )


def test_auto_takes_the_native_kernel_for_float32_only():
    with pytest.raises(ValueError, match=r"cannot run on 'cpu' here: .*float64"):
        ops.group_advantages(torch.zeros(2).double(), torch.zeros(2).long(), backend="cpu")
    assert ops.group_advantages(torch.ones(2).double(), torch.zeros(2).long()).dtype == torch.double
    assert (
        ops.group_advantages(torch.ones(2).bfloat16(), torch.zeros(2).long()).dtype == torch.float
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"center": "meen"}, r"center: got 'meen'.*Did you mean 'mean'"),
        ({"scale": "group"}, r"scale: got 'group', allowed is one of std, batch_std, none"),
        ({"center": "length"}, r"lengths: center 'length' weights"),
        ({"ddof": 2}, r"ddof: got 2, allowed is 0 or 1"),
        ({"eps": -1.0}, r"eps: got -1.0"),
        ({"valid": torch.ones(2)}, r"valid: got shape \[2\], allowed is \[3\]"),
        ({"group_ids": torch.zeros(3)}, r"group_ids: got torch.float32"),
        ({"rewards": torch.zeros(3, 1)}, r"rewards: got shape \[3, 1\], allowed is \[S\]"),
        ({"backend": "refrence"}, r"backend: got 'refrence'.*Did you mean 'reference'"),
        ({"backend": "opencl"}, r"backend: got 'opencl', allowed is one of auto, reference"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"rewards": torch.rand(3), "group_ids": torch.zeros(3).long()} | changes
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(**arguments)
