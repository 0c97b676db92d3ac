from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eapo_fast import recipes
from eapo_fast.errors import ConfigError
from eapo_fast.recipes import Recipe

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "base_recipes.json"


def test_names():
    base = {"eapo", "dapo", "grpo", "dr_grpo", "bnpo", "rloo", "opo", "gspo", "gmpo", "cispo"}
    assert base <= set(recipes.names())
    assert recipes.names() == sorted(recipes.names())
    assert all(recipes.get(name).name == name for name in recipes.names())


def test_eapo_is_dapo_without_dual_clip():
    eapo = recipes.get("eapo")
    assert (eapo.center, eapo.scale, eapo.advantage_eps, eapo.ddof) == ("mean", "std", 1e-6, 1)
    assert (eapo.epsilon, eapo.clip_high, eapo.delta) == (0.2, 0.28, None)
    assert (eapo.beta, eapo.entropy_coef, eapo.aggregation) == (0.0, 0.0, "token-mean")
    assert (eapo.group_filter, eapo.locality) == ("accuracy", "token-local")
    named = {"name": "", "source": "", "delta": None}
    assert eapo.to_dict() | named == recipes.get("dapo").to_dict() | named


@pytest.mark.parametrize(
    ("name", "locality"),
    [("eapo", "token-local"), ("cispo", "token-local"), ("gspo", "sequence-level"),
     ("gspo_token", "sequence-level"), ("gmpo", "sequence-level")],
)  # fmt: skip
def test_locality(name, locality):
    assert recipes.get(name).locality == locality


def test_unknown_name_proposes_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'dr-grpo', allowed is .*Did you mean 'dr_grpo'"):
        recipes.get("dr-grpo")


@pytest.mark.parametrize("name", recipes.names())
def test_json_and_text(name):
    recipe = recipes.get(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert set(json.loads(recipe.to_json())) == {f.name for f in dataclasses.fields(Recipe)}
    assert repr(recipe).startswith(f"Recipe(name={name!r}, ")
    assert str(recipe).startswith(f"{name}: advantage ")
    assert "\n" not in str(recipe)
    assert len({recipe, recipe.replace()}) == 1


def test_text_says_what_differs():
    recipe = recipes.get("dapo").replace(beta=0.04, entropy_coef=1e-3)
    assert str(recipe) == (
        "dapo: advantage mean/std, token clip [0.8, 1.28] dual 10, 0.04 KL (k3), "
        "0.001 entropy bonus, token-mean, filter accuracy (token-local)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"aggregation": "token_mean"},
            r"aggregation: got 'token_mean'.*Did you mean 'token-mean'",
        ),
        ({"surrogate": "clipped"}, r"surrogate: got 'clipped', allowed is one of 'clip'"),
        ({"ratio": "sequence", "surrogate": "geo_mean"}, r"'geo_mean' fixes its own; use 'token'"),
        ({"ratio": "sequence", "surrogate": "reinforce"}, r"'reinforce' fixes its own"),
        ({"epsilon": -0.1}, r"epsilon: got -0.1, allowed is a finite number of at least 0"),
        ({"epsilon_high": float("nan")}, r"epsilon_high: got nan"),
        ({"epsilon": "0.2"}, r"epsilon: got '0.2'"),
        ({"beta": True}, r"beta: got True"),
        ({"delta": 1.1}, r"delta: got 1.1, allowed is more than 1 \+ epsilon_high \(1.28\)"),
        ({"delta": 3.0, "surrogate": "none"}, r"delta: surrogate 'none' has no dual clip"),
        ({"kl": "k4"}, r"kl: got 'k4', allowed is one of 'k1', 'abs', 'k2', 'k3'"),
        ({"group_filter": "reward"}, r"group_filter: got 'reward', allowed is one of None"),
        ({"ddof": True}, r"ddof: got True, allowed is one of 0, 1"),
        ({"max_length": 0}, r"max_length: got 0"),
        ({"name": ""}, r"name: a recipe needs a name"),
        ({"epsilon_hi": 0.3}, r"no field 'epsilon_hi'. Did you mean 'epsilon_high'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipes.get("eapo").replace(**changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "lr": 1}'])
def test_broken_json(text):
    with pytest.raises(ConfigError):
        Recipe.from_json(text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("eapo").epsilon = 0.3


def test_published_group_filter():
    (case,) = [c for c in json.loads(GOLDEN.read_text()) if c["method"] == "dapo.dynamic_filter"]
    metric, group = case["inputs"]["metric"], case["inputs"]["group"]
    members = [[m for m, g in zip(metric, group, strict=True) if g == k] for k in range(4)]
    kept = [recipes.get("dapo").keeps_group(m) for m in members]
    assert kept == case["expected"]["keep_group"]


def test_group_filter_leaves_unknown_accuracies_out():
    eapo = recipes.get("eapo")
    assert not eapo.keeps_group([1.0, None, 1.0])
    assert eapo.keeps_group([1.0, None, 0.0])
    assert recipes.get("grpo").keeps_group([1.0, 1.0])


def test_recipes_need_no_torch():
    code = "import sys, eapo_fast.recipes as r; r.get('eapo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
