"""The names that users rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import eapo_fast
from eapo_fast import EAPOConfig, Recipe, recipes
from eapo_fast.errors import ConfigError

ROOT = {
    "Trainer", "EAPOConfig", "Sampler", "SamplerConfig", "SamplingParams", "Completion", "Rollout",
    "Segment", "ConsultProtocol", "collect_rollouts", "Expert", "ConsultRequest", "ExpertReply",
    "ConsultScheduler", "ConsultPolicy", "Budget", "Recipe", "ops", "recipes", "rewards", "experts",
}  # fmt: skip


def test_names_of_the_package() -> None:
    assert set(eapo_fast.__all__) == ROOT
    for name in ROOT:
        assert getattr(eapo_fast, name) is not None
    assert set(dir(eapo_fast)) >= ROOT
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        _ = eapo_fast.Trianer


def test_trainer_takes_trls_arguments_in_trls_order() -> None:
    parameters = inspect.signature(eapo_fast.Trainer).parameters
    assert list(parameters)[:9] == [
        "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
        "reward_processing_classes", "callbacks", "optimizers",
    ]  # fmt: skip
    assert parameters["expert"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["peft_config"].kind is inspect.Parameter.KEYWORD_ONLY


def test_importing_costs_no_torch() -> None:
    code = "import sys, eapo_fast, eapo_fast.config, eapo_fast.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_rooms_import_only_downwards() -> None:
    package = Path(inspect.getfile(eapo_fast)).parent
    forbidden = {
        "engine": ("rollout", "training", "trainer", "experts", "rewards"),
        "experts": ("engine", "rollout", "training", "trainer"),
        "rewards": ("engine", "rollout", "training", "trainer", "experts"),
        "recipes": ("engine", "rollout", "training", "trainer", "ops", "kernels"),
        "rollout": ("training", "trainer"),
        "training": ("trainer",),
    }
    for room, above in forbidden.items():
        for file in (package / room).rglob("*.py"):
            text = file.read_text().split("if TYPE_CHECKING")[0]
            for name in above:
                assert f"from eapo_fast.{name}" not in text, f"{file.name} imports {name}"


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_survive_json(name: str) -> None:
    recipe = recipes.get(name)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_config_refuses_foreign_settings_with_a_reason() -> None:
    with pytest.raises(TypeError, match="Did you mean 'num_generations'"):
        EAPOConfig(num_generation=4)
    with pytest.raises(ConfigError, match="samples from the trained weights"):
        EAPOConfig(use_vllm=True)
    assert EAPOConfig(use_vllm=False) == EAPOConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"num_generations": 1}, "num_generations: got 1, allowed is a number, 2 or more"),
        ({"consult_schedule": "invers"}, "Did you mean 'inverse'"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "Nearest valid: 2 or 4"),
        ({"steps_per_generation": 2, "generation_batch_size": 16}, "give one"),
        ({"generation_batch_size": 12}, "multiples of per_device_train_batch_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_names_field_value_and_remedy(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EAPOConfig(**settings)


def test_recipe_overrides() -> None:
    from eapo_fast.training.recipe import resolve_recipe

    eapo = resolve_recipe(EAPOConfig())
    assert (eapo.epsilon, eapo.epsilon_high, eapo.beta) == (0.2, 0.28, 0.0)
    assert eapo.group_filter == "accuracy"
    changed = resolve_recipe(EAPOConfig(epsilon_high=0.3, beta=0.1, loss_type="dr_grpo"))
    assert (changed.epsilon_high, changed.beta) == (0.3, 0.1)
    assert changed.aggregation == "seq-mean-token-sum-norm"
    assert resolve_recipe(EAPOConfig(scale_rewards=False)).scale == "none"
    assert resolve_recipe(EAPOConfig(importance_sampling_level="sequence")).ratio == "sequence"
