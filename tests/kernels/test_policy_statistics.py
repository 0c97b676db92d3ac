"""Token weights, what entropy terms compare with, and statistics that are missing or wrong."""

from __future__ import annotations

import itertools

import policy_cases as cases
import pytest
import torch
from policy_cases import CU, DOUBLE, random_case

from eapo_fast import ops, recipes


def _details(case, recipe):
    return ops.policy_loss(**case, recipe=recipe, details=True).details


@pytest.mark.parametrize("mapping", ["linear", "exponential"])
def test_steer_weights_at_the_edges(mapping):
    case = random_case()
    steer = recipes.get("steer")
    recipe = steer.replace(reweighting=steer.reweighting.replace(mapping=mapping))
    seen = _details(case, recipe)
    weight, change = seen["reweighting"][case["mask"]], seen["score"][case["mask"]]
    least = recipe.reweighting.low
    assert weight[change.argmax()].item() == pytest.approx(least)
    assert ((weight >= least) & (weight <= recipe.reweighting.most)).all()
    assert torch.equal(change.argsort(), weight.argsort(descending=True))
    same = {k: v[:1].repeat(21) if v.shape == (21,) else v for k, v in case.items() if k != "stats"}
    same["advantages"] = torch.ones(6, dtype=DOUBLE)
    same["stats"] = {"old_entropy": torch.ones(21, dtype=DOUBLE)}
    flat = _details(same | {"mask": torch.ones(21)}, recipe)["reweighting"]
    assert len(flat.unique()) == 1
    if mapping == "linear":
        assert flat[0].item() == pytest.approx(1.0)


def test_siren_threshold_is_torchs_quantile():
    case = random_case(11)
    siren = recipes.get("siren").replace(max_length=5)
    for quantile in (0.0, 0.3, 0.5, 0.8, 1.0):
        target = siren.entropy_target.replace(quantile=quantile)
        seen = _details(case, siren.replace(entropy_target=target))
        for start, stop in itertools.pairwise(CU):
            live = case["mask"][start:stop]
            if live.any():
                values = case["stats"]["truncated_entropy"][start:stop][live]
                edge = torch.quantile(values, quantile)
                torch.testing.assert_close(
                    seen["threshold"][start:stop][live], edge.expand(len(values))
                )
                assert torch.equal(seen["selected"][start:stop][live], values > edge)


def test_siren_without_an_anchor_only_reports_its_level():
    case, recipe = random_case(), recipes.get("siren").replace(max_length=5)
    del case["stats"]["anchor"]
    found = ops.policy_loss(**case, recipe=recipe)
    plain = ops.policy_loss(**case, recipe=recipe.replace(entropy_target=None))
    torch.testing.assert_close(found.loss, plain.loss)
    assert not found.c.any()
    case["stats"]["anchor"] = found.metrics["truncated_entropy"] - 0.1
    assert ops.policy_loss(**case, recipe=recipe).loss - plain.loss == pytest.approx(0.005 * 0.01)


def test_epo_moves_the_policy_as_a_plain_bonus_does():
    case, epo = random_case(), recipes.get("epo")
    bonus = ops.policy_loss(**case, recipe=epo.replace(entropy_band=None))
    history = torch.tensor([1.0, 3.0], dtype=DOUBLE)
    found = {}
    for name, stats in {
        "batch": {},
        "history": {"entropy_history": history},
        "mean": {"entropy_mean": history.mean()},
        "tokens": {"entropy_mean": torch.full((21,), 2.0, dtype=DOUBLE)},
        "off": {"entropy_history": history, "smoothing": torch.tensor(0.0)},
    }.items():
        found[name] = ops.policy_loss(**case | {"stats": stats}, recipe=epo)
        assert torch.equal(found[name].a, bonus.a)
        assert torch.equal(found[name].b, bonus.b)
    assert found["history"].loss == found["mean"].loss == found["tokens"].loss
    assert found["history"].loss > bonus.loss == found["off"].loss
    assert found["history"].metrics["entropy_penalty"] > 0


def test_a_part_without_statistics_of_the_whole_is_refused():
    case = random_case()
    for name in ("clip_cov", "kl_cov", "lp_reg", "steer", "siren", "epo"):
        recipe = recipes.get(name).replace(max_length=9)
        half = cases.part(case, 0, 3)
        with pytest.raises(ValueError, match=r"of the whole batch, and 6 of its 15 tokens"):
            ops.policy_loss(**half, **cases.counts(case), recipe=recipe)
        narrow = recipe.replace(scope="micro_batch")
        ops.policy_loss(**half, **cases.counts(case), recipe=narrow)


def test_plain_recipes_need_no_statistics():
    case = random_case()
    given = {k: v for k, v in case.items() if k not in ("ref_logprob", "stats")}
    for name in ("eapo", "gspo", "reinforce_pp"):
        assert ops.policy_statistics(**given, recipe=recipes.get(name)) == {}


@pytest.mark.parametrize(
    ("name", "missing"),
    [("steer", "old_entropy"), ("lp_reg", "max_logprob"), ("siren", "truncated_entropy")],
)
def test_missing_statistics_are_named(name, missing):
    case = random_case()
    del case["stats"][missing]
    recipe = recipes.get(name).replace(max_length=9)
    with pytest.raises(ValueError, match=rf"recipe '{name}' reads '{missing}'; pass it"):
        ops.policy_loss(**case, recipe=recipe)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"anchor": torch.ones(2)}, r"stats\['anchor'\]: got shape \[2\], allowed is \[\]"),
        (
            {"step": torch.tensor(1.5)},
            r"stats\['step'\]: got torch.float32, allowed is",
        ),
        ({"entropy_history": torch.ones(0)}, r"got no values; leave it out"),
        ({"selected": torch.ones(5)}, r"stats\['selected'\]: got shape \[5\], allowed is \[21\]"),
        ({"entropy_mean": 1.5}, r"stats\['entropy_mean'\]: got float, a torch tensor"),
    ],
)
def test_statistics_that_do_not_fit_are_named(stats, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(**random_case() | {"stats": stats}, recipe=recipes.get("eapo"))


@pytest.mark.parametrize("name", ["eapo", "kl_cov", "gspo"])
def test_input_that_is_not_finite_is_named(name):
    case = random_case()
    at = int(case["mask"].nonzero()[4])
    case["logprob"][at] = torch.nan
    with pytest.raises(ValueError, match=rf"^logprob: entry {at} is nan \(1 such entries\)"):
        ops.policy_loss(**case, recipe=recipes.get(name))


def test_overflow_is_named():
    case = {k: v.float() for k, v in random_case().items() if k not in ("stats", "cu_seqlens")}
    case |= {"cu_seqlens": torch.tensor(CU), "advantages": torch.full((6,), 3e38)}
    case["old_logprob"] = case["logprob"] - 5
    at = int(case["mask"].nonzero()[0])
    with pytest.raises(ValueError, match=rf"the loss overflows, first at token {at}"):
        ops.policy_loss(**case, recipe=recipes.get("rloo"))
