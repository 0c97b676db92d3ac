from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eapo_fast import recipes
from eapo_fast.errors import ConfigError
from eapo_fast.recipes import EntropyBand, EntropyTarget, Recipe, Reweighting, Selection

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "base_recipes.json"

_DROP = {"score": "covariance", "pick": "highest", "fraction": 0.1, "effect": "drop"}


def test_names():
    base = {"eapo", "dapo", "grpo", "dr_grpo", "bnpo", "rloo", "opo", "gspo", "gmpo", "cispo"}
    base |= {"reinforce_pp", "reinforce_pp_baseline", "ppo_dual_clip"}
    assert base | {"clip_cov", "kl_cov", "lp_reg", "steer", "epo", "siren"} <= set(recipes.names())
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
     ("gspo_token", "sequence-level"), ("gmpo", "sequence-level"), ("epo", "token-local"),
     ("clip_cov", "batch-global"), ("steer", "batch-global"), ("siren", "batch-global")],
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
    ("name", "text"),
    [
        ("clip_cov", "random 0.0002 by covariance above 1 below 5: drop,"),
        ("kl_cov", "highest 0.002 by covariance: 1 abs kl_to_old,"),
        ("lp_reg", "lowest 0.01 by logprob of A < 0: 1 k3 kl_to_proxy,"),
        ("steer", "linear weight 0.8 to 1.2 by entropy change,"),
        ("epo", "0.001 entropy bonus less token band [0.8, 1.2] at 0.1,"),
        ("siren", "0.005 (top-0.8 entropy above q0.8 - anchor)^2,"),
        ("reinforce_pp", "advantage none/none whitened,"),
    ],
)
def test_text_of_the_parts(name, text):
    assert text in str(recipes.get(name))


def test_parts_are_data():
    recipe = recipes.get("eapo").replace(
        selection=_DROP,
        reweighting={"low": 0.5},
        entropy_coef=0.1,
        entropy_band=EntropyBand(level="sequence", width=7),
        entropy_target={},
    )
    assert recipe.selection == Selection(**_DROP)
    assert recipe.reweighting == Reweighting(low=0.5)
    assert recipe.entropy_target == EntropyTarget()
    assert json.loads(recipe.to_json())["selection"]["fraction"] == 0.1
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert len({recipe, recipe.replace()}) == 1
    wider = recipe.replace(selection=recipe.selection.replace(fraction=0.2))
    assert wider.selection.fraction == 0.2
    assert wider.replace(selection=None).selection is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.selection.fraction = 0.3


def test_a_recipe_says_what_it_reads():
    read = {name: recipes.get(name).stats for name in recipes.names()}
    assert {name: stats for name, stats in read.items() if stats} == {
        "lp_reg": ("max_logprob", "kept_mass"),
        "siren": ("truncated_entropy",),
        "steer": ("old_entropy",),
    }
    assert [n for n in recipes.names() if recipes.get(n).needs_entropy] == ["epo"]
    assert not any(recipes.get(name).needs_reference for name in recipes.names())


@pytest.mark.parametrize(("epoch", "total"), [(-1, 150), (3, 0), (float("nan"), 150)])
def test_phase_weight_refuses_what_is_no_epoch(epoch, total):
    assert recipes.phase_weight(0) == 1.0
    with pytest.raises(ConfigError, match=r"^phase_weight: got epoch"):
        recipes.phase_weight(epoch, total)


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
        ({"max_length": 0}, r"max_length: got 0, allowed is a finite number of at least 1"),
        ({"name": ""}, r"name: got '', allowed is text that is not empty"),
        ({"gamma": 1.01}, r"gamma: got 1.01, .* of at least 0 and of at most 1$"),
        ({"whiten": 1}, r"whiten: got 1, allowed is one of False, True"),
        ({"scope": "microbatch"}, r"scope: got 'microbatch'.*Did you mean 'micro_batch'"),
        ({"entropy_band": EntropyBand()}, r"entropy_band: entropy_coef is 0, so there is no bonus"),
        ({"selection": 3}, r"selection: got 3, allowed is a Selection, a mapping or None"),
        ({"selection": {"score": "covariance"}}, r"pick: missing; a selection needs it"),
        ({"selection": _DROP | {"frction": 1}}, r"a selection has no field 'frction'. Did you"),
        ({"selection": _DROP | {"fraction": 0}}, r"selection.fraction: got 0, .*above 0 and of at"),
        ({"selection": _DROP | {"effect": "dorp"}}, r"got 'dorp'.*Did you mean 'drop'"),
        ({"selection": _DROP | {"minimum": 0}}, r"selection.minimum: got 0, allowed is an integer"),
        ({"selection": _DROP | {"seed": 1.0}}, r"selection.seed: got 1.0, allowed is an integer"),
        (
            {"selection": _DROP | {"skip_clipped": True}, "surrogate": "reinforce"},
            r"selection: surrogate 'reinforce' has no loss without clip",
        ),
        ({"reweighting": {"low": 1.3}}, r"reweighting.low: got 1.3, .* above 0 and of at most 1.2"),
        (
            {"reweighting": {"mapping": "exponential", "low": 1.1}},
            r"reweighting.low: got 1.1, .* at most 1$",
        ),
        ({"entropy_target": {"top_p": 2}}, r"entropy_target.top_p: got 2"),
        ({"entropy_target": {"top_k": 0}}, r"entropy_target.top_k: got 0"),
        (
            {"entropy_coef": 0.1, "entropy_band": {"width": 8}},
            r"entropy_band.width: level 'token' takes no mean",
        ),
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


def test_what_is_no_name_and_no_recipe_is_refused_in_words():
    for name in (3, None, [], "EAPO"):
        with pytest.raises(ConfigError, match=r"^recipe: got .*, allowed is one of bnpo"):
            recipes.get(name)
    with pytest.raises(ConfigError, match=r"Did you mean 'grpo'"):
        recipes.get("GRPO")
    with pytest.raises(ConfigError, match=r"^a recipe must be a JSON object"):
        Recipe.from_json(None)
    with pytest.raises(ConfigError, match=r"^a recipe: got \[1\], allowed is a mapping"):
        Recipe.from_dict([1])
    with pytest.raises(ConfigError, match=r"^epsilon: got 1000"):
        Recipe.from_json('{"name": "x", "epsilon": 1' + "0" * 400 + "}")
    with pytest.raises(ConfigError, match=r"^source: got 3, allowed is text"):
        Recipe(name="x", source=3)
