"""Policy losses in Triton against the float64 reference: token-local and sequence-level recipes."""

from __future__ import annotations

from typing import Any

import policy_cases as cases
import pytest
import torch
from policy_cases import GRID
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.recipes import Recipe

RECIPES = [r for r in GRID if r.locality != "batch-global" and r.entropy_band is None]
Case = dict[str, Any]


def case_of(lengths: list[int], *, poison: float | None = None) -> Case:
    """Packed sequences, some tokens masked out; those may hold `poison`."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = sum(lengths)

    def normal(size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(size, generator=generator) * scale + shift

    logprob = normal(rows, 0.8, -1.5)
    case = {
        "logprob": logprob,
        "old_logprob": logprob + normal(rows, 0.6),
        "entropy": normal(rows).abs(),
        "ref_logprob": logprob + normal(rows, 0.5),
    }
    mask = torch.rand(rows, generator=generator) > 0.25
    if poison is not None:
        for values in case.values():
            values[~mask] = poison
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return case | {"advantages": normal(len(lengths)), "mask": mask, "cu_seqlens": edges}


def moved(case: Case, to: Any) -> Case:
    return {k: v.to(to) if isinstance(v, Tensor) else v for k, v in case.items()}


def compare(case: Case, recipe: Recipe, device: torch.device, **more: Any) -> ops.LossOutput:
    floats = {
        k: v.double() for k, v in case.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    stats = {k: v.double() for k, v in more.get("stats", {}).items()}
    wanted = ops.policy_loss(**case | floats, **more | {"stats": stats}, recipe=recipe)
    here = {k: {n: x.to(device) for n, x in v.items()} if k == "stats" else v
            for k, v in more.items()}  # fmt: skip
    found = ops.policy_loss(**moved(case, device), **here, recipe=recipe, backend="triton")
    close = {"check_dtype": False, "check_device": False, "rtol": 1e-5, "atol": 1e-5}
    for name in ("loss", "token_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), **close)
    share = max(float(wanted.a.abs().max()), 1e-30) if len(wanted.a) else 1.0
    for name in ("a", "b"):
        got, want = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(got / share, want / share, **close)
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, **close)
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_every_recipe(recipe: Recipe, device: torch.device) -> None:
    compare(case_of([3, 0, 40, 1, 25]), recipe, device)


@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo", "ppo_dual_clip"])
def test_long_sequences_and_optional_inputs(name: str, device: torch.device) -> None:
    recipe, case = recipes.get(name).replace(beta=0.0), case_of([1025, 2047, 5])
    compare(case, recipe, device)
    bare = {k: v for k, v in case.items() if k not in ("mask", "entropy", "ref_logprob")}
    compare(bare, recipe, device)
    tokens = torch.randn(3077, generator=torch.Generator().manual_seed(1))
    compare(case | {"advantages": tokens}, recipe, device)
    compare(case, recipe, device, stats={"weight": tokens.abs()})
    compare(case, recipe.replace(aggregation="seq-mean-token-mean"), device, num_tokens=9999,
            num_sequences=torch.tensor(7))  # fmt: skip


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo", "cispo"])
def test_masked_tokens_may_hold_anything(name: str, poison: float, device: torch.device) -> None:
    recipe = recipes.get(name).replace(beta=0.1, entropy_coef=0.01)
    compare(case_of([30, 4], poison=poison), recipe, device)


@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo"])
def test_nothing_to_train_on(name: str, device: torch.device) -> None:
    case = case_of([7, 0, 9])
    found = compare(case | {"mask": torch.zeros(16, dtype=torch.bool)}, recipes.get(name), device)
    assert float(found.loss) == 0
    assert not found.a.any()
    compare(case_of([]), recipes.get(name), device)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["ppo_dual_clip", "gspo", "gmpo", "cispo", "rloo"])
def test_far_off_policy(name: str, sign: float, device: torch.device) -> None:
    case = case_of([6, 3])
    case["old_logprob"] = case["logprob"] + sign * torch.linspace(0, 60, 9)
    recipe = recipes.get(name).replace(beta=0.1)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    wanted = ops.policy_loss(**wide, recipe=recipe)
    found = ops.policy_loss(**moved(case, device), recipe=recipe, backend="triton")
    for x in ("loss", "a", "token_loss"):
        got, want = getattr(found, x), getattr(wanted, x)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-6)


def test_small_kl_is_exact(device: torch.device) -> None:
    case = case_of([50])
    case["ref_logprob"] = case["logprob"] + torch.logspace(-5, 0, 50)
    recipe = recipes.get("grpo").replace(beta=1.0)
    zero = case | {"advantages": torch.zeros(1), "mask": torch.ones(50, dtype=torch.bool)}
    excess = (zero["logprob"] - zero["ref_logprob"]).double()
    found = ops.policy_loss(**moved(zero, device), recipe=recipe, backend="triton")
    want = torch.expm1(-excess) + excess
    torch.testing.assert_close(found.token_loss.cpu().double(), want, rtol=3e-6, atol=0)


def test_parts_add_up(device: torch.device) -> None:
    case = cases.random_case()
    case = {
        name: values.float() if values.is_floating_point() else values
        for name, values in case.items()
        if name != "stats"
    }
    for name in ("eapo", "gspo", "gmpo"):
        recipe, total = recipes.get(name), torch.zeros(())
        whole = compare(case, recipe, device)
        for first, last in ((0, 2), (2, 3), (3, 6)):
            part = cases.part(case | {"stats": {}}, first, last) | cases.counts(case)
            del part["stats"]
            total += compare(part, recipe, device).loss.cpu()
        torch.testing.assert_close(total, whole.loss.cpu())


def test_the_same_bits_again(device: torch.device) -> None:
    case, recipe = moved(case_of([700, 1100]), device), recipes.get("gspo")
    runs = [ops.policy_loss(**case, recipe=recipe, backend="triton") for _ in range(2)]
    assert torch.equal(runs[0].a, runs[1].a)
    assert torch.equal(runs[0].loss, runs[1].loss)
