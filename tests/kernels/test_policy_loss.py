from __future__ import annotations

import itertools

import policy_oracle as oracle
import pytest
import torch

from eapo_fast import ops, recipes
from eapo_fast.recipes.recipe import AGGREGATIONS, KLS

_CU = [0, 4, 4, 9, 10, 15, 21]
_DOUBLE = torch.float64


def _packed(nested, mask):
    """Rows of a padded table that are inside a sequence, in order."""
    flat = [x for row, m in zip(nested, mask, strict=True) for x in row[: len(m)]]
    return torch.tensor(flat, dtype=_DOUBLE)


def _case_recipe(case):
    inputs, kind = case["inputs"], case["method"].split(".")[0]
    name = {"ppo_clip": "ppo_dual_clip", "gspo": "gspo_token"}.get(kind, kind)
    changes = {"epsilon": inputs["eps_low"], "epsilon_high": inputs["eps_high"]}
    if "aggregation" in inputs:
        changes["aggregation"] = inputs["aggregation"]
    if "norm_length" in inputs:
        changes["max_length"] = int(inputs["norm_length"])
    if "dual_clip" in inputs:
        changes["delta"] = inputs["dual_clip"]
    return recipes.get(name).replace(**changes)


def _random(seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows, sequences = _CU[-1], len(_CU) - 1

    def normal(size, scale=1.0, shift=0.0):
        return torch.randn(size, generator=generator, dtype=_DOUBLE) * scale + shift

    logprob = normal(rows, 0.8, -1.5)
    return {
        "logprob": logprob,
        "old_logprob": logprob + normal(rows, 0.6),
        "advantages": normal(sequences),
        "cu_seqlens": torch.tensor(_CU),
        "mask": torch.rand(rows, generator=generator) > 0.25,
        "entropy": normal(rows).abs(),
        "ref_logprob": logprob + normal(rows, 0.5),
    }


def _oracle(recipe, case, **counts):
    return oracle.policy_loss(
        recipe,
        case["logprob"],
        case["old_logprob"],
        case["advantages"],
        case["cu_seqlens"].tolist(),
        case["mask"],
        case["entropy"],
        case["ref_logprob"],
        (case.get("stats") or {}).get("weight"),
        **counts,
    )


def _grid():
    for name in recipes.names():
        yield recipes.get(name).replace(max_length=11)
    for aggregation in AGGREGATIONS:
        base = recipes.get("ppo_dual_clip").replace(aggregation=aggregation, max_length=7)
        yield base.replace(name=aggregation, delta=1.5)
    for kl in KLS:
        yield recipes.get("grpo").replace(name=f"kl {kl}", kl=kl, beta=0.3)
    for ratio, surrogate in itertools.product(
        ("sequence", "sequence_token"), ("clip", "none", "detached_clip")
    ):
        yield recipes.get("eapo").replace(
            name=f"{ratio} {surrogate}", ratio=ratio, surrogate=surrogate
        )
    yield recipes.get("gmpo").replace(name="gmpo asymmetric", epsilon=0.05, epsilon_high=0.3)
    yield recipes.get("eapo").replace(name="everything", delta=1.6, beta=0.2, entropy_coef=0.05)


_GRID = list(_grid())


@pytest.mark.parametrize(
    "case",
    oracle.golden_cases(
        "ppo_clip.loss", "ppo_dual_clip.loss", "dapo.loss", "gspo.loss", "gmpo.loss", "cispo.loss"
    ),
    ids=lambda c: f"{c['method']} {c['inputs'].get('aggregation', '')}",
)
def test_published_values(case):
    inputs, expected = case["inputs"], case["expected"]
    mask = _packed(inputs["mask"], inputs["mask"])
    width = len(inputs["mask"][0])
    logprob = _packed(inputs["logp"], inputs["mask"]).requires_grad_()
    found = ops.policy_loss(
        logprob,
        _packed(inputs["logp_old"], inputs["mask"]),
        _packed(inputs["advantage"], inputs["mask"]),
        torch.arange(0, len(mask) + 1, width),
        mask=mask,
        recipe=_case_recipe(case),
    )
    found.loss.backward()
    close = {"rtol": 0, "atol": case["tolerance"]}
    slopes = torch.tensor(expected["dloss_dlogp"], dtype=_DOUBLE).flatten()
    torch.testing.assert_close(found.loss.item(), expected["loss"], **close)
    torch.testing.assert_close(logprob.grad, slopes, **close)
    if "per_token_loss" in expected:
        losses = torch.tensor(expected["per_token_loss"], dtype=_DOUBLE).flatten()
        torch.testing.assert_close(found.token_loss, losses * mask, **close)


@pytest.mark.parametrize(
    "case", oracle.golden_cases(*(f"kl.{k}" for k in KLS)), ids=lambda c: c["method"]
)
def test_published_kl(case):
    inputs, expected = case["inputs"], case["expected"]
    logprob = torch.tensor(inputs["logp"], dtype=_DOUBLE).flatten()
    mask = torch.tensor(inputs["mask"]).flatten()
    recipe = recipes.get("reinforce").replace(kl=case["method"].removeprefix("kl."), beta=1.0)
    found = ops.policy_loss(
        logprob,
        logprob,
        torch.zeros(2, dtype=_DOUBLE),
        torch.tensor([0, 3, 6]),
        mask=mask,
        ref_logprob=torch.tensor(inputs["logp_ref"], dtype=_DOUBLE).flatten(),
        recipe=recipe,
    )
    close = {"rtol": 0, "atol": case["tolerance"]}
    slope = torch.tensor(expected["dvalue_dlogp"], dtype=_DOUBLE).flatten()
    values = torch.tensor(expected["value"], dtype=_DOUBLE).flatten()
    torch.testing.assert_close(found.token_loss, values, **close)
    torch.testing.assert_close(found.a * 5, slope, **close)
    torch.testing.assert_close(found.metrics["kl"].item(), expected["token_mean"], **close)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_published_aggregation_with_an_empty_sequence(aggregation):
    (case,) = oracle.golden_cases("aggregation.empty_sequence")
    losses = torch.tensor(case["inputs"]["per_token_loss"], dtype=_DOUBLE).flatten()
    found = ops.policy_loss(
        -losses,
        -losses,
        torch.ones(3, dtype=_DOUBLE),
        torch.tensor([0, 3, 6, 9]),
        mask=torch.tensor(case["inputs"]["mask"]).flatten(),
        recipe=recipes.get("reinforce").replace(aggregation=aggregation, max_length=8),
    )
    assert found.loss.item() == pytest.approx(case["expected"][aggregation], abs=1e-12)


@pytest.mark.parametrize("per_token", [False, True], ids=["A per sequence", "A per token"])
@pytest.mark.parametrize("recipe", _GRID, ids=lambda r: r.name)
def test_against_autograd(recipe, per_token):
    case = _random()
    if per_token:
        case["advantages"] = torch.randn(
            _CU[-1], generator=torch.Generator().manual_seed(8), dtype=_DOUBLE
        )
        case["stats"] = {"weight": torch.linspace(0.2, 1.7, _CU[-1], dtype=_DOUBLE)}
    leaves = [case["logprob"].requires_grad_(), case["entropy"].requires_grad_()]
    wanted, token_loss = _oracle(recipe, case)
    found = ops.policy_loss(**case, recipe=recipe)
    slopes = torch.autograd.grad(wanted, leaves, allow_unused=True)
    got = torch.autograd.grad(found.loss * 3, leaves)
    torch.testing.assert_close(found.loss, wanted.detach(), check_dtype=True)
    torch.testing.assert_close(found.token_loss, token_loss)
    for slope, grad, coefficient in zip(slopes, got, (found.a, found.b), strict=True):
        slope = torch.zeros_like(grad) if slope is None else slope
        torch.testing.assert_close(coefficient, slope)
        torch.testing.assert_close(grad, 3 * slope)
    assert found.c is None


@pytest.mark.parametrize("recipe", _GRID, ids=lambda r: r.name)
def test_parts_add_up_to_the_whole(recipe):
    case = _random(4)
    whole = ops.policy_loss(**case, recipe=recipe)
    counts = {
        "num_tokens": int(case["mask"].sum()),
        "num_sequences": sum(bool(case["mask"][a:b].any()) for a, b in itertools.pairwise(_CU)),
    }
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        start, stop = _CU[first], _CU[last]
        piece = {k: v[start:stop] for k, v in case.items() if k not in ("advantages", "cu_seqlens")}
        piece["advantages"] = case["advantages"][first:last]
        piece["cu_seqlens"] = case["cu_seqlens"][first : last + 1] - start
        parts.append(ops.policy_loss(**piece, **counts, recipe=recipe))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p.a for p in parts]), whole.a)
    torch.testing.assert_close(torch.cat([p.b for p in parts]), whole.b)
    for name, value in whole.metrics.items():
        values = torch.stack([p.metrics[name] for p in parts])
        assert not value.requires_grad
        assert value.shape == ()
        torch.testing.assert_close(values.max() if name.endswith("_max") else values.sum(), value)


@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo", "dr_grpo"])
def test_order_of_sequences_does_not_matter(name):
    recipe, case = recipes.get(name).replace(max_length=9), _random(6)
    order = [4, 0, 5, 2, 1, 3]
    rows = torch.cat([torch.arange(_CU[i], _CU[i + 1]) for i in order])
    moved = {k: v[rows] for k, v in case.items() if k not in ("advantages", "cu_seqlens")}
    moved["advantages"] = case["advantages"][order]
    lengths = case["cu_seqlens"].diff()[order]
    moved["cu_seqlens"] = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    here, there = ops.policy_loss(**case, recipe=recipe), ops.policy_loss(**moved, recipe=recipe)
    torch.testing.assert_close(there.loss, here.loss)
    torch.testing.assert_close(there.a, here.a[rows])


@pytest.mark.parametrize("recipe", _GRID, ids=lambda r: r.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_masked_tokens_may_hold_anything(recipe, poison):
    case = _random(7)
    clean = ops.policy_loss(**case, recipe=recipe)
    dirty = {
        k: torch.where(case["mask"], v, poison)
        if k in ("logprob", "old_logprob", "entropy", "ref_logprob")
        else v
        for k, v in case.items()
    }
    dirty["logprob"].requires_grad_()
    found = ops.policy_loss(**dirty, recipe=recipe)
    found.loss.backward()
    assert torch.equal(found.loss, clean.loss)
    assert torch.equal(found.token_loss, clean.token_loss)
    assert torch.equal(dirty["logprob"].grad, clean.a)
    assert not clean.a[~case["mask"]].any()


@pytest.mark.parametrize("recipe", _GRID, ids=lambda r: r.name)
def test_nothing_to_train_on_is_a_loss_of_zero(recipe):
    case = _random()
    for rows, cu in ((21, _CU), (0, [0, 0, 0]), (0, [0])):
        empty = {k: v[:rows] for k, v in case.items()}
        empty["mask"] = torch.zeros(rows).bool()
        empty["cu_seqlens"] = torch.tensor(cu)
        empty["advantages"] = torch.ones(len(cu) - 1, dtype=_DOUBLE)
        empty["logprob"] = empty["logprob"].detach().requires_grad_()
        found = ops.policy_loss(**empty, recipe=recipe)
        found.loss.backward()
        assert found.loss.item() == 0
        assert not empty["logprob"].grad.any()
        assert all(value == 0 for value in found.metrics.values())


def test_metrics_say_what_happened():
    """Ratios 1.5, 0.5, 1, 4 with advantages 1, -1, 1, -1; the last token is masked out."""
    ratios = torch.tensor([1.5, 0.5, 1.0, 4.0, 99.0], dtype=_DOUBLE)
    old = torch.full((5,), -2.0, dtype=_DOUBLE)
    found = ops.policy_loss(
        old + ratios.log(),
        old,
        torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=_DOUBLE),
        torch.tensor([0, 5]),
        mask=torch.tensor([1, 1, 1, 1, 0]),
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0], dtype=_DOUBLE),
        recipe=recipes.get("dapo").replace(delta=3.0),
    )
    got = {name: value.item() for name, value in found.metrics.items()}
    logs = [abs(x) for x in ratios[:4].log().tolist()]
    assert got == pytest.approx(
        {
            "clip_ratio/low_mean": 0.25,
            "clip_ratio/high_mean": 0.25,
            "clip_ratio/region_mean": 0.5,
            "clip_ratio/delta_mean": 0.25,
            "ratio_mean": 7 / 4,
            "ratio_max": 4.0,
            "logp_difference_mean": sum(logs) / 4,
            "logp_difference_max": max(logs),
            "entropy": 2.5,
        }
    )


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["A < 0", "A > 0"])
@pytest.mark.parametrize("recipe", _GRID, ids=lambda r: r.name)
def test_far_off_policy_saturates(recipe, sign):
    logprob = torch.tensor([-1.0, -500.0, -3.0, -1.0, -40.0], dtype=_DOUBLE, requires_grad=True)
    case = {
        "logprob": logprob,
        "old_logprob": torch.tensor([-400.0, -1.0, -3.0, -40.0, -1.0], dtype=_DOUBLE),
        "advantages": torch.tensor([sign, sign], dtype=_DOUBLE),
        "cu_seqlens": torch.tensor([0, 1, 5]),
        "mask": torch.ones(5).bool(),
        "entropy": torch.ones(5, dtype=_DOUBLE),
        "ref_logprob": torch.tensor([-30.0, -1.0, -3.0, -40.0, -30.0], dtype=_DOUBLE),
    }
    wanted, _ = _oracle(recipe, case)
    found = ops.policy_loss(**case, recipe=recipe)
    torch.testing.assert_close(found.loss.detach(), wanted.detach())
    torch.testing.assert_close(found.a, torch.autograd.grad(wanted, logprob)[0])
    low = {k: v.float() if v.is_floating_point() else v for k, v in case.items()}
    assert torch.isfinite(ops.policy_loss(**low, recipe=recipe).a).all()


def test_low_precision_is_computed_in_float32():
    case = {k: v.bfloat16() if v.is_floating_point() else v for k, v in _random().items()}
    case["logprob"].requires_grad_()
    found = ops.policy_loss(**case, recipe=recipes.get("eapo"))
    found.loss.backward()
    assert found.loss.dtype == found.a.dtype == torch.float32
    assert case["logprob"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 9, 4, 21])}, r"falls from entry 1 to 2"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"runs from 0 to 9, must run from 0 to N = 21"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.long)}, r"cu_seqlens: got no entries"),
        ({"advantages": torch.ones(5)}, r"got 5 values.*one a sequence \(6\) or one a token"),
        ({"old_logprob": torch.zeros(20)}, r"old_logprob: got shape \[20\], allowed is \[21\]"),
        ({"mask": torch.ones(21, 1)}, r"mask: got shape \[21, 1\]"),
        ({"entropy": None, "recipe": recipes.get("eapo").replace(entropy_coef=0.1)}, r"^entropy: "),
        ({"ref_logprob": None, "recipe": recipes.get("grpo").replace(beta=0.1)}, r"^ref_logprob:"),
        ({"recipe": recipes.get("dr_grpo")}, r"divides by max_length.*replace\(max_length"),
        ({"recipe": "eapo"}, r"recipe: got 'eapo', a Recipe is needed"),
        ({"stats": {"wieght": torch.ones(21)}}, r"stats: got 'wieght'.*Did you mean 'weight'"),
        ({"backend": "cuda"}, r"policy_loss has no 'cuda' implementation"),
        ({"logprob": [0.1]}, r"logprob: got list, a torch tensor is needed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(**{"recipe": recipes.get("eapo"), **_random(), **changes})
