"""Recipes that read more than log-probabilities: trained, cut into micro-batches, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import ROWS, letters, settings
from test_training_math import ADVANTAGES, make_rollout

from eapo_fast import EAPOConfig, Trainer, recipes
from eapo_fast.recipes import EntropyTarget, Recipe
from eapo_fast.rollout import Rollout
from eapo_fast.training.optimizer import LearningRate
from eapo_fast.training.recipe import resolve_recipe
from eapo_fast.training.update import Updater

NAMES = [
    "reinforce_pp",
    "reinforce_pp_baseline",
    "clip_cov",
    "kl_cov",
    "steer",
    "lp_reg",
    "siren",
    "epo",
]


def busy(name: str) -> Recipe:
    """The recipe with settings that show on a few tokens."""
    recipe = recipes.get(name).replace(group_filter=None)  # the reward here knows no right or wrong
    changes: dict[str, dict[str, Any]] = {
        "clip_cov": {"selection": {"low": -1.0, "high": 2.0, "fraction": 0.3}},
        "kl_cov": {"selection": {"fraction": 0.3}},
        "lp_reg": {"selection": {"fraction": 0.6}},
    }
    for part, fields in changes.get(name, {}).items():
        recipe = recipe.replace(**{part: getattr(recipe, part).replace(**fields)})
    if name == "siren":
        recipe = recipe.replace(entropy_target=EntropyTarget(coef=0.7, quantile=0.4))
    return recipe


@pytest.fixture
def rollouts() -> list[Rollout]:
    return [
        make_rollout([5, 6, 7], [("policy", [10, 11]), ("expert", [1, 2]), ("policy", [9])], 0, []),
        make_rollout([5, 6, 7], [("policy", [20, 21])], 0, [30, 31]),
        make_rollout([8], [("policy", [22]), ("notice", [3, 4, 5]), ("policy", [24, 25])], 1, [9]),
        make_rollout([8, 9, 40, 41, 42], [("policy", list(range(50, 67)))], 1, []),
    ]


def update(
    model: Any, rollouts: list[Rollout], recipe: Recipe, tokens: int, anchor: float | None = None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    args = EAPOConfig(bf16=False, learning_rate=0.0, recipe=recipe, micro_batch_tokens=tokens)
    updater = Updater(model, args, resolve_recipe(args), LearningRate(0.0, "constant", 0, 1))
    updater.statistics.anchor = anchor
    updater.observe(rollouts)
    model.zero_grad(set_to_none=True)
    metrics = updater._backward(rollouts, ADVANTAGES, step=3)
    return metrics, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_cut_into_micro_batches_changes_nothing(
    name: str, make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    model = make_model()
    whole, wanted = update(model, rollouts, busy(name), 1000, anchor=1.0)
    for tokens in (1, 12):
        parts, got = update(model, rollouts, busy(name), tokens, anchor=1.0)
        assert parts.keys() == whole.keys()
        for key, value in whole.items():
            assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        for key, gradient in wanted.items():
            torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)


def test_advantages_are_whitened_over_all_policy_tokens(
    make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    model = make_model()
    counts = torch.tensor([r.num_policy_tokens for r in rollouts])
    each = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(counts)
    white = (each - each.mean()) / (each.var() + 1e-8).sqrt()
    first = torch.cat([torch.zeros(1).long(), counts.cumsum(0)[:-1]])
    args = EAPOConfig(bf16=False, learning_rate=0.0, recipe="ppo")
    updater = Updater(model, args, resolve_recipe(args), LearningRate(0.0, "constant", 0, 1))
    model.zero_grad(set_to_none=True)
    updater._backward(rollouts, white[first].tolist())
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, got = update(model, rollouts, busy("reinforce_pp"), 12)
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)


def build(folder: Path, model: Any, tokenizer: Any, recipe: Recipe, **changes: Any) -> Trainer:
    args = settings(folder, recipe=recipe, micro_batch_tokens=40, learning_rate=0.01, **changes)
    return Trainer(model, letters, args, ROWS, None, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_trains_and_resumes_to_the_same_bits(
    name: str, make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    """Two optimizer steps a generation: the second one is off-policy."""
    options: dict[str, Any] = {
        "max_steps": 4,
        "steps_per_generation": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = build(tmp_path / "a", make_model(), bpe_tokenizer, busy(name), **options)
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    assert all(row["skipped"] == 0 for row in whole.state.log_history)
    assert any(not torch.equal(p, before[n]) for n, p in whole.model.named_parameters())
    resumed = build(tmp_path / "b", make_model(), bpe_tokenizer, busy(name), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.updater.statistics.state_dict() == whole.updater.statistics.state_dict()
    for (key, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), key
    if name == "epo":
        assert len(whole.updater.statistics.entropies) == 4
    if name == "siren":
        assert whole.updater.statistics.anchor is not None
