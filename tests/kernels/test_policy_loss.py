from __future__ import annotations

import policy_cases as cases
import pytest
import torch
from policy_cases import CU, DOUBLE, GRID, random_case

from eapo_fast import ops, recipes


@pytest.mark.parametrize("per_token", [False, True], ids=["A per sequence", "A per token"])
@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_against_autograd(recipe, per_token):
    case = random_case()
    if per_token:
        case["advantages"] = torch.randn(
            CU[-1], generator=torch.Generator().manual_seed(8), dtype=DOUBLE
        )
        case["stats"]["weight"] = torch.linspace(0.2, 1.7, CU[-1], dtype=DOUBLE)
    case = cases.forced(case, recipe)
    leaves = [case["logprob"].requires_grad_(), case["entropy"].requires_grad_()]
    leaves.append(case["stats"]["truncated_entropy"].requires_grad_())
    wanted, token_loss = cases.wanted(recipe, case)
    found = ops.policy_loss(**case, recipe=recipe)
    slopes = torch.autograd.grad(wanted, leaves, allow_unused=True)
    got = torch.autograd.grad(found.loss * 3, leaves, allow_unused=True)
    torch.testing.assert_close(found.loss, wanted.detach(), check_dtype=True)
    torch.testing.assert_close(found.token_loss, token_loss)
    for slope, grad, coefficient in zip(slopes, got, (found.a, found.b, found.c), strict=True):
        if grad is None:
            assert coefficient is None or not coefficient.any()
            assert slope is None
            continue
        torch.testing.assert_close(coefficient, slope)
        torch.testing.assert_close(grad, 3 * slope)
    assert (found.c is None) == (recipe.entropy_target is None)
    assert not found.details


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_parts_add_up_to_the_whole(recipe):
    case = random_case(4)
    whole = ops.policy_loss(**case, recipe=recipe)
    given = {k: v for k, v in case.items() if k != "ref_logprob"}
    case["stats"] |= ops.policy_statistics(**given, recipe=recipe)
    counts = cases.counts(case)
    parts = [
        ops.policy_loss(**cases.part(case, *cut), **counts, recipe=recipe)
        for cut in ((0, 2), (2, 3), (3, 6))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for name in ("a", "b", "token_loss", *([] if whole.c is None else ["c"])):
        joined = torch.cat([getattr(p, name) for p in parts])
        torch.testing.assert_close(joined, getattr(whole, name))
    for name, value in whole.metrics.items():
        values = torch.stack([p.metrics[name] for p in parts])
        assert not value.requires_grad
        assert value.shape == ()
        torch.testing.assert_close(values.max() if name.endswith("_max") else values.sum(), value)


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_order_of_sequences_does_not_matter(recipe):
    case = random_case(6)
    moved, rows = cases.permuted(case, [4, 0, 5, 2, 1, 3])
    here, there = ops.policy_loss(**case, recipe=recipe), ops.policy_loss(**moved, recipe=recipe)
    torch.testing.assert_close(there.loss, here.loss)
    torch.testing.assert_close(there.a, here.a[rows])
    if here.c is not None:
        torch.testing.assert_close(there.c, here.c[rows])


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_masked_tokens_may_hold_anything(recipe, poison):
    case = random_case(7)
    clean = ops.policy_loss(**case, recipe=recipe)

    def spoilt(values):
        whole = values.shape == case["mask"].shape and values.is_floating_point()
        return torch.where(case["mask"], values, poison) if whole else values

    dirty = {k: spoilt(v) for k, v in case.items() if k != "stats"}
    dirty["stats"] = {k: spoilt(v) for k, v in case["stats"].items()}
    dirty["logprob"].requires_grad_()
    found = ops.policy_loss(**dirty, recipe=recipe)
    found.loss.backward()
    assert torch.equal(found.loss, clean.loss)
    assert torch.equal(found.token_loss, clean.token_loss)
    assert torch.equal(dirty["logprob"].grad, clean.a)
    assert not clean.a[~case["mask"]].any()


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_nothing_to_train_on_is_a_loss_of_zero(recipe):
    case = random_case()
    for rows, cu in ((21, CU), (0, [0, 0, 0]), (0, [0])):
        empty = cases.rows_of(case, slice(rows), slice(0), torch.tensor(cu))
        empty["mask"] = torch.zeros(rows).bool()
        empty["advantages"] = torch.ones(len(cu) - 1, dtype=DOUBLE)
        empty["logprob"] = empty["logprob"].detach().requires_grad_()
        found = ops.policy_loss(**empty, recipe=recipe)
        found.loss.backward()
        assert found.loss.item() == 0
        assert not empty["logprob"].grad.any()
        assert all(value == 0 for value in found.metrics.values())


def test_metrics_say_what_happened():
    """Ratios 1.5, 0.5, 1, 4 with advantages 1, -1, 1, -1; the last token is masked out."""
    ratios = torch.tensor([1.5, 0.5, 1.0, 4.0, 99.0], dtype=DOUBLE)
    old = torch.full((5,), -2.0, dtype=DOUBLE)
    found = ops.policy_loss(
        old + ratios.log(),
        old,
        torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=DOUBLE),
        torch.tensor([0, 5]),
        mask=torch.tensor([1, 1, 1, 1, 0]),
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0], dtype=DOUBLE),
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
@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_far_off_policy_saturates(recipe, sign):
    logprob = torch.tensor([-1.0, -500.0, -3.0, -1.0, -40.0], dtype=DOUBLE, requires_grad=True)
    case = {
        "logprob": logprob,
        "old_logprob": torch.tensor([-400.0, -1.0, -3.0, -40.0, -1.0], dtype=DOUBLE),
        "advantages": torch.tensor([sign, 2 * sign], dtype=DOUBLE),
        "cu_seqlens": torch.tensor([0, 1, 5]),
        "mask": torch.ones(5).bool(),
        "entropy": torch.ones(5, dtype=DOUBLE),
        "ref_logprob": torch.tensor([-30.0, -1.0, -3.0, -40.0, -30.0], dtype=DOUBLE),
    }
    case["stats"] = {k: torch.ones(5, dtype=DOUBLE) for k in cases.PER_TOKEN[:4]}
    case = cases.forced(case, recipe)
    wanted, _ = cases.wanted(recipe, case)
    found = ops.policy_loss(**case, recipe=recipe)
    torch.testing.assert_close(found.loss.detach(), wanted.detach())
    torch.testing.assert_close(found.a, torch.autograd.grad(wanted, logprob)[0])
    low = {k: v.float() for k, v in case.items() if k not in ("cu_seqlens", "stats")}
    low |= {"cu_seqlens": case["cu_seqlens"]}
    low["stats"] = {k: v.float() for k, v in case["stats"].items()}
    assert torch.isfinite(ops.policy_loss(**low, recipe=recipe).a).all()


def test_low_precision_is_computed_in_float32():
    case = {k: v for k, v in random_case().items() if k != "stats"}
    case = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.items()}
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
        ({"old_logprob": None}, r"old_logprob: got NoneType, a torch tensor is needed"),
        ({"mask": [True] * 21}, r"mask: got list, a torch tensor is needed"),
        (
            {"old_logprob": torch.zeros(21, requires_grad=True)},
            r"old_logprob: requires a gradient, and the loss has none for it; pass old_logprob.det",
        ),
        (
            {"stats": {"old_entropy": torch.zeros(21, requires_grad=True)}},
            r"stats\['old_entropy'\]: requires a gradient",
        ),
        ({"logprob": [0.1]}, r"logprob: got list, a torch tensor is needed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(**{"recipe": recipes.get("eapo"), **random_case(), **changes})
