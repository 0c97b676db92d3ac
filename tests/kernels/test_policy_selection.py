"""Which tokens are picked, and what becomes of them."""

from __future__ import annotations

import random

import policy_cases as cases
import pytest
import torch
from policy_cases import DOUBLE, random_case

from eapo_fast import _core, ops, recipes
from eapo_fast.kernels.policy_loss import draws

_BIG = 400


def _selection(**changes):
    return recipes.get("kl_cov").selection.replace(**{"effect": "drop"} | changes)


def _eapo(**changes):
    return recipes.get("eapo").replace(**changes)


def _details(case, recipe):
    return ops.policy_loss(**case, recipe=recipe, details=True).details


def _many(seed=1, sequences=8):
    """A batch with room for many picks; a fifth of the tokens is masked out."""
    generator = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(_BIG, generator=generator, dtype=DOUBLE) * 3
    edges = torch.randperm(_BIG - 1, generator=generator)[: sequences - 1] + 1
    return {
        "logprob": logprob,
        "old_logprob": logprob + 0.1 * torch.randn(_BIG, generator=generator, dtype=DOUBLE),
        "advantages": torch.randn(sequences, generator=generator, dtype=DOUBLE),
        "cu_seqlens": torch.cat([torch.tensor([0, _BIG]), edges]).sort().values,
        "mask": torch.rand(_BIG, generator=generator) > 0.2,
        "stats": {},
    }


def test_draws_equal_the_scalar_ones():
    rng = random.Random(0)
    for _ in range(50):
        seed, rows = rng.getrandbits(64), rng.randrange(1, 5)
        keys = [
            [rng.randrange(-(2**63), 2**63) for _ in range(3)] for _ in range(rng.randrange(1, 5))
        ]
        found = draws.keyed_uniform(seed, f"purpose {rows}", tuple(torch.tensor(k) for k in keys))
        wanted = [
            _core.keyed_uniform(seed, f"purpose {rows}", list(k)) for k in zip(*keys, strict=True)
        ]
        assert found.tolist() == wanted


def test_fingerprints_know_the_numbers_and_not_the_place():
    values = torch.tensor([0.0, -1.5, -2.0, -0.0, -1.5, -2.0, -1.5, 0.0, -2.0])
    position = torch.arange(3).repeat(3)
    sequence = torch.arange(3).repeat_interleave(3)
    found = draws.fingerprints(values, position, sequence, 4).tolist()
    assert found[0] == found[1]
    assert found[3] == 0
    assert len(set(found)) == 3
    as_double = draws.fingerprints(values.double(), position, sequence, 4).tolist()
    assert as_double == found


@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.29, 0.3, 1.0])
@pytest.mark.parametrize("sign", [None, "negative", "positive"])
@pytest.mark.parametrize("pick", ["highest", "lowest", "random"])
def test_how_many_are_picked(pick, sign, fraction):
    case = _many()
    recipe = _eapo(selection=_selection(pick=pick, sign=sign, fraction=fraction))
    seen = _details(case, recipe)
    per_token = case["advantages"].repeat_interleave(case["cu_seqlens"].diff())
    pool = (
        case["mask"]
        & {
            None: torch.ones(_BIG).bool(),
            "negative": per_token < 0,
            "positive": per_token > 0,
        }[sign]
    )
    assert torch.equal(seen["eligible"], pool)
    assert seen["selected"].sum() == max(1, int(fraction * int(pool.sum())))
    assert not (seen["selected"] & ~pool).any()
    if pick != "random":
        worst = seen["score"][seen["selected"]], seen["score"][pool & ~seen["selected"]]
        assert fraction == 1 or (
            worst[0].min() >= worst[1].max()
            if pick == "highest"
            else worst[0].max() <= worst[1].min()
        )


def test_bounds_and_clips_limit_the_choice():
    case = random_case(2)
    recipe = _eapo(
        epsilon=0.1,
        selection=_selection(pick="highest", fraction=1.0, low=-0.4, high=0.5, skip_clipped=True),
    )
    seen = _details(case, recipe)
    clipped = seen["clipped_low"] | seen["clipped_high"]
    inside = (seen["score"] > -0.4) & (seen["score"] < 0.5) & case["mask"]
    assert (inside & clipped).any()
    assert torch.equal(seen["selected"], inside & ~clipped)


def test_too_few_are_none():
    case = _many()
    for minimum, picked in ((3, 3), (4, 0)):
        fraction = 3.5 / int(case["mask"].sum())
        recipe = _eapo(selection=_selection(fraction=fraction, minimum=minimum))
        assert _details(case, recipe)["selected"].sum() == picked


def test_random_choice_is_uniform_and_keyed_by_seed_and_step():
    case, hits = _many(), torch.zeros(_BIG)
    recipe = _eapo(selection=_selection(pick="random", fraction=0.25))
    first = _details(case, recipe)["selected"]
    for step in range(200):
        again = case | {"stats": {"step": torch.tensor(step)}}
        hits += _details(again, recipe)["selected"]
        if step == 0:
            assert torch.equal(hits != 0, first)
    rate = hits[case["mask"]] / 200
    assert rate.mean().item() == pytest.approx(0.25, abs=0.01)
    assert 0.1 < rate.min() < rate.max() < 0.4  # five sigma on either side
    torch.manual_seed(7)
    assert torch.equal(_details(case, recipe)["selected"], first)
    other = recipe.replace(selection=recipe.selection.replace(seed=1))
    assert not torch.equal(_details(case, other)["selected"], first)


@pytest.mark.parametrize("pick", ["highest", "lowest", "random"])
def test_choice_moves_with_the_rollouts_even_among_equals(pick):
    """All of a rollout's tokens have one score, so the k-th place is a tie."""
    case = _many()
    case["logprob"] = torch.zeros(_BIG, dtype=DOUBLE)
    recipe = _eapo(selection=_selection(pick=pick, fraction=0.37))
    here = _details(case, recipe)["selected"]
    for seed in range(5):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
        moved, rows = cases.permuted(case, order)
        assert torch.equal(_details(moved, recipe)["selected"], here[rows])


def test_covariance_leaves_impossible_tokens_out_of_the_mean():
    case = _many()
    recipe = _eapo(selection=_selection(fraction=0.1))
    at = int(case["mask"].nonzero()[3])
    case["logprob"][at] = -torch.inf
    seen = _details(case, recipe)
    assert torch.isfinite(seen["score"][torch.arange(_BIG) != at]).all()
    assert seen["selected"].sum() == int(0.1 * int(case["mask"].sum()))


def test_dropped_tokens_stay_in_the_denominator():
    case = random_case()
    recipe = _eapo(selection=_selection(fraction=0.4))
    plain, found = (ops.policy_loss(**case, recipe=r) for r in (_eapo(), recipe))
    picked = _details(case, recipe)["selected"]
    assert picked.any()
    assert not found.a[picked].any()
    assert torch.equal(found.a[~picked], plain.a[~picked])
    assert found.metrics["selected_mean"].item() == pytest.approx(
        picked.sum().item() / case["mask"].sum().item()
    )


def test_kl_cov_has_no_effect_on_the_first_step():
    case = random_case()
    case["old_logprob"] = case["logprob"].clone()
    recipe = recipes.get("kl_cov")
    plain = ops.policy_loss(**case, recipe=recipe.replace(selection=None))
    assert torch.equal(ops.policy_loss(**case, recipe=recipe).a, plain.a)


def test_lp_reg_takes_the_clip_off_picked_tokens_below_the_proxy():
    old = torch.tensor([-6.0, -6.0, -6.0, -0.5], dtype=DOUBLE)
    recipe = recipes.get("lp_reg")
    recipe = recipe.replace(selection=recipe.selection.replace(fraction=0.75), epsilon_high=0.1)
    case = {
        "logprob": old + torch.tensor([0.2, 0.2, -0.5, 0.0], dtype=DOUBLE),
        "old_logprob": old,
        "advantages": -torch.ones(1, dtype=DOUBLE),
        "cu_seqlens": torch.tensor([0, 4]),
        "stats": {
            "max_logprob": torch.tensor([-2.5, -2.0, -2.5, -0.5], dtype=DOUBLE),
            "kept_mass": torch.tensor([0.5, 0.5, 0.9, 1.0], dtype=DOUBLE),
        },
    }
    seen = _details(case, recipe)
    assert seen["picked"].tolist() == [True, True, True, False]
    assert seen["selected"].tolist() == [True, False, True, False]  # 1 is outside of the kept set
    assert seen["proxy_logprob"][1] == -1e4
    assert seen["proxy_logprob"][0].item() == pytest.approx(-6 - torch.tensor(0.5).log().item())
