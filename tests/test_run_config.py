from __future__ import annotations

import sys

import pytest
import yaml

from eapo_fast import run_config
from eapo_fast.errors import ConfigError
from eapo_fast.run_config import (
    build_expert,
    build_rewards,
    load_run,
    parse_overrides,
    read_yaml,
)

MINIMAL = "model: models/tiny\ntrain_dataset: train.jsonl\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, *, minimal: bool = True):
        path = tmp_path / "run.yaml"
        path.write_text((MINIMAL if minimal else "") + text, encoding="utf-8")
        return path

    return write


def test_a_file_becomes_typed_settings(write):
    run = load_run(
        write(
            "eval_dataset: test.jsonl\nreward_funcs: [accuracy, format]\n"
            "expert: {kind: calculator}\nlearning_rate: 1e-4\nmax_steps: 50\neval_strategy: no\n"
            "bf16: null\n"
        )
    )
    assert (run.model, run.train_dataset, run.eval_dataset) == (
        "models/tiny", "train.jsonl", "test.jsonl",
    )  # fmt: skip
    assert run.reward_funcs == ("accuracy", "format")
    assert run.expert == {"kind": "calculator"}
    assert (run.args.learning_rate, run.args.max_steps) == (1e-4, 50)
    assert (run.args.eval_strategy, run.args.bf16) == ("no", None)


def test_overrides_win_and_reach_into_mappings(write):
    path = write("max_steps: 50\nexpert: {kind: openai, model: a}\n")
    words = (
        "--max-steps -1 --expert.model=b --expert.base_url http://h/v1 --log-completions --seed 7"
    )
    run = load_run(path, words.split())
    assert (run.args.max_steps, run.args.seed, run.args.log_completions) == (-1, 7, True)
    assert run.expert == {"kind": "openai", "model": "b", "base_url": "http://h/v1"}


def test_resolved_run_reads_back_the_same(write, tmp_path):
    run = load_run(write("learning_rate: 3e-5\nexpert: {kind: calculator}\n"))
    (tmp_path / "resolved.yaml").write_text(run.to_yaml())
    assert load_run(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param(["--a-b", "1"], {"a_b": 1}, id="dash"),
        pytest.param(["--a=x=y"], {"a": "x=y"}, id="equals-in-value"),
        pytest.param(["--a", "-0.5", "--b"], {"a": -0.5, "b": True}, id="negative-and-flag"),
        pytest.param(["--a", "[1, no, 2e3]"], {"a": [1, "no", 2000.0]}, id="list"),
        pytest.param(["--a", "null", "--b="], {"a": None, "b": None}, id="null"),
        pytest.param(["--a.b.c", "1", "--a.d", "2"], {"a": {"b": {"c": 1}, "d": 2}}, id="nested"),
    ],
)
def test_override_words_are_yaml_scalars(words, settings):
    assert parse_overrides(words) == settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("3.", 3.0), ("1_000", 1000),
        ("no", "no"), ("on", "on"), ("true", True), (".inf", float("inf")), ("12:30", "12:30"),
        ("1.2.3", "1.2.3"), ("008", 8.0), ("2024-01-02", "2024-01-02"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = parse_overrides(["--key", text])["key"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "learning_rat: 1\n", r"'learning_rat'.*Did you mean 'learning_rate'", id="typo"
        ),
        pytest.param("expret: {}\n", r"unknown key 'expret'.*Did you mean 'expert'", id="run-key"),
        pytest.param("zzzzzz: 1\n", r"unknown key 'zzzzzz'.*--help", id="nothing-close"),
        pytest.param("max_steps: many\n", r"max_steps: got 'many', allowed is int", id="type"),
        pytest.param("max_steps: 1.5\n", r"max_steps: got 1.5, allowed is int", id="fraction"),
        pytest.param("seed: true\n", r"seed: got True, allowed is int", id="bool-for-int"),
        pytest.param("bf16: 1\n", r"bf16: got 1, allowed is bool or null", id="int-for-bool"),
        pytest.param("num_generations: 3\n", r"num_generations 3.*Nearest valid", id="divide"),
        pytest.param("use_vllm: true\n", r"use_vllm", id="foreign"),
        pytest.param("expert: calculator\n", r"expert: got 'calculator'.*kind: calc", id="no-map"),
        pytest.param("reward_funcs: []\n", r"reward_funcs: got \[\]", id="no-rewards"),
        pytest.param("reward_funcs: [{a: 1}]\n", r"reward_funcs: got", id="rewards-mapping"),
        pytest.param("model: other\n", r"not YAML.*'model' is given twice", id="twice"),
        pytest.param("a: [1\n", r"is not YAML", id="syntax"),
        pytest.param("expert_budget: {calls: 5}\n", r"expert_budget.*consults", id="budget"),
    ],
)
def test_every_mistake_names_its_key(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "model is missing", id="empty"),
        pytest.param("model: x\n", "train_dataset is missing", id="no-data"),
        pytest.param(
            "model: 3\ntrain_dataset: a\n", "model: got 3, allowed is a path", id="number"
        ),
        pytest.param("- a\n", "key: value", id="list"),
        pytest.param("1: a\n", "key: value", id="number-key"),
        pytest.param("a: !!python/object/apply:os.getpid []\n", "not YAML", id="no-objects"),
    ],
)
def test_files_that_are_no_run(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run(write(text, minimal=False))


@pytest.mark.parametrize("name", ["absent.yaml", "."], ids=["absent", "directory"])
def test_unreadable_file(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot read the run file"):
        read_yaml(tmp_path / name)


@pytest.mark.parametrize("word", ["stray", "--", "-x"])
def test_stray_words_are_refused(word):
    with pytest.raises(ConfigError, match="expected --key value"):
        parse_overrides(["--a", "1", word])


def test_budget_mappings_become_budgets(write):
    run = load_run(write("expert_budget: [{consults: 5, per: step}, {tokens: 100}]\n"))
    assert [(b.consults, b.tokens, b.per) for b in run.args.expert_budget] == [
        (5, None, "step"), (None, 100, "run"),
    ]  # fmt: skip
    assert yaml.safe_load(run.to_yaml())["expert_budget"][0]["consults"] == 5


def test_calculator_is_built_by_kind():
    from eapo_fast.experts import Calculator

    assert isinstance(build_expert({"kind": "calculator"}), Calculator)
    assert build_expert(None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"kind": "calculater"}, "Did you mean 'calculator'", id="kind"),
        pytest.param({}, "expert.kind: got None", id="no-kind"),
        pytest.param({"kind": "openai", "modle": "x"}, "Did you mean 'model'", id="setting"),
        pytest.param({"kind": "openai"}, r"expert\.\w+ is missing", id="needed"),
    ],
)
def test_expert_mistakes_name_the_setting(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_expert(settings)


def test_shipped_rewards_by_name():
    from eapo_fast import rewards

    assert build_rewards(["accuracy", {"name": "format"}]) == [rewards.accuracy, rewards.format]


def test_rewards_with_settings_are_made():
    made = build_rewards([{"name": "consult_cost"}, {"name": "functools.lru_cache", "maxsize": 4}])
    assert callable(made[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("acuracy", "Did you mean 'accuracy'", id="typo"),
        pytest.param("my_absent_module.score", "cannot import my_absent_module", id="module"),
        pytest.param({"name": "format", "weight": 2}, "takes no settings", id="settings"),
        pytest.param({"name": "accuracy", "weight": 2}, "unexpected .*weight", id="setting"),
        pytest.param({"name": "consult_cost", "zz": 2}, "consult_cost with .*zz", id="setting"),
        pytest.param("math.score", "math has no function 'score'", id="function"),
        pytest.param("math.pi", "math has no function 'pi'", id="not-callable"),
    ],
)
def test_reward_mistakes_name_the_function(name, message):
    with pytest.raises(ConfigError, match=message):
        build_rewards([name])


def test_rewards_of_the_user_are_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_2741.py").write_text("def short(**_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build_rewards(["my_rewards_2741.short"])[0](completions=["x"]) == [1.0]


def test_trainer_gets_what_the_file_says(write, monkeypatch):
    seen = {}

    class Fake:
        def __init__(self, *positional, **named):
            seen.update(positional=positional, named=named)

    monkeypatch.setitem(sys.modules, "eapo_fast.trainer", type(sys)("eapo_fast.trainer"))
    sys.modules["eapo_fast.trainer"].Trainer = Fake
    run = load_run(write("reward_funcs: math.fsum\n"))
    run_config.build_trainer(run)
    assert seen["positional"] == (
        "models/tiny", [__import__("math").fsum], run.args, "train.jsonl", None,
    )  # fmt: skip
    assert seen["named"] == {"expert": None}
