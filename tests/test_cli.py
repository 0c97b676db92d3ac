from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from eapo_fast import cli
from eapo_fast.errors import ConfigError

COMMANDS = ["demo", "train", "eval", "table", "distill", "rollouts", "consults", "info", "compare"]
HEAVY = ("torch", "transformers", "matplotlib", "rich", "yaml", "numpy")


@pytest.fixture
def module(monkeypatch):
    """Put a stand-in module with the given names into `sys.modules`."""

    def put(name: str, **names):
        stand_in = types.ModuleType(name)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, name, stand_in)

    return put


@pytest.mark.parametrize(
    "words", [[], *([name] for name in COMMANDS if name != "compare")], ids=str
)
def test_help_answers_without_heavy_imports(words):
    code = (
        "import sys\nfrom eapo_fast.cli import main\n"
        f"try:\n    main({[*words, '--help']!r})\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: eapo-fast" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("eapo-fast ")


@pytest.mark.parametrize(
    ("words", "call"),
    [
        pytest.param([], (None, None, "runs/demo", True), id="defaults"),
        pytest.param(
            ["--steps", "3", "--seed", "5", "--out", "x", "--expert", "none"],
            (3, 5, "x", False),
            id="all",
        ),
    ],
)
def test_demo_hands_its_options_on(module, words, call):
    seen = []

    def run_demo(*, steps, seed, output_dir, expert):
        seen.append((steps, seed, output_dir, expert))

    module("eapo_fast.demo.run", run_demo=run_demo)
    assert cli.main(["demo", *words]) == 0
    assert seen == [call]


@pytest.mark.parametrize(
    "words",
    [["demo", "--steps", "0"], ["demo", "--step", "3"], ["eval"], ["nonsense"], []],
    ids=["zero-steps", "no-abbreviations", "missing-options", "unknown-command", "no-command"],
)
def test_usage_errors_leave_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: eapo-fast" in capsys.readouterr().err


def test_errors_are_one_line_without_traceback(module, capsys, monkeypatch):
    def run_demo(**_):
        raise ConfigError("output_dir: cannot write")

    monkeypatch.delenv("EAPO_FAST_DEBUG", raising=False)
    module("eapo_fast.demo.run", run_demo=run_demo)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "eapo-fast: error: output_dir: cannot write\n"
    monkeypatch.setenv("EAPO_FAST_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main(["demo"])


def test_interruption_leaves_with_status_130(module, capsys):
    def run_demo(**_):
        raise KeyboardInterrupt

    module("eapo_fast.demo.run", run_demo=run_demo)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\neapo-fast: interrupted\n"


class FakeTrainer:
    def __init__(self, model, rewards, args, train_dataset, eval_dataset, *, expert):
        self.args = args

    def describe(self):
        return {"completions_per_step": self.args.completions_per_step, "train_prompts": 7}

    def train(self):
        type(self).last = self
        return SimpleNamespace(metrics={"steps": 3, "run_dir": "runs/x"})


@pytest.fixture
def run_file(tmp_path, module):
    module("eapo_fast.trainer", Trainer=FakeTrainer)
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ntrain_dataset: t.jsonl\nreward_funcs: math.fsum\nmax_steps: 3\n"
        "per_device_train_batch_size: 16\n"
    )
    return str(path)


@pytest.mark.parametrize("early", [True, False], ids=["before-file", "after-file"])
def test_dry_run_prints_the_resolved_run_and_its_counts(run_file, capsys, early):
    words = ["--dry-run", run_file] if early else [run_file, "--dry-run"]
    assert cli.main(["train", *words, "--seed", "9"]) == 0
    out = capsys.readouterr().out
    for line in (
        "model: m",
        "seed: 9",
        "# completions per step: 16",
        "# train prompts: 7",
    ):
        assert line in out.splitlines()
    assert not hasattr(FakeTrainer, "last")


def test_train_trains(run_file, monkeypatch):
    monkeypatch.setattr(FakeTrainer, "last", None, raising=False)
    assert cli.main(["train", run_file]) == 0
    assert FakeTrainer.last is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--sede", "3"], "Did you mean 'seed'", id="typo"),
        pytest.param(["stray"], "expected --key value", id="stray"),
        pytest.param(["--max-steps", "soon"], "max_steps: got 'soon'", id="type"),
    ],
)
def test_train_refuses_bad_overrides_in_one_line(run_file, capsys, words, message):
    assert cli.main(["train", run_file, *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--expert", "calculator"], "need --assisted", id="solo-with-expert"),
        pytest.param(["--expert-record", "f"], "need --assisted", id="solo-with-record"),
        pytest.param(["--assisted"], "needs an expert", id="assisted-without"),
        pytest.param(["--method", "workflow"], "needs an expert", id="workflow-without"),
        pytest.param(["--assisted", "--expert", "local"], "--expert-model DIR", id="local-without"),
    ],
)
def test_eval_refuses_contradictions(capsys, words, message):
    assert cli.main(["eval", "--model", "m", "--data", "d", *words]) == 2
    assert message in capsys.readouterr().err


def test_eval_hands_its_options_on(module, capsys):
    seen = []

    def evaluate_model(model, data, out, settings, **options):
        seen.append((model, data, out, settings, options["expert"], options["progress"]))
        return "measured"

    module("eapo_fast.evaluation", evaluate_model=evaluate_model, EvalSettings=dict)
    module("eapo_fast.evaluation.report", result_text=str.upper, progress_line=lambda file: file)
    words = ["--n", "4", "--top-k", "40", "--method", "eapo", "--quiet", "--out", "x"]
    assert cli.main(["eval", "--model", "m", "--data", "d", *words]) == 0
    assert capsys.readouterr().out == "MEASURED\n"
    [(model, data, out, settings, expert, progress)] = seen
    assert (model, data, out, expert, progress) == ("m", "d", "x", None, None)
    assert settings["n"] == 4
    assert settings["method"] == "eapo"
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (0.6, 0.95, 40)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["calculator"], {"kind": "calculator"}),
        (["openai", "--expert-url", "u", "--expert-model", "m", "--expert-key-env", "K"],
         {"kind": "openai", "base_url": "u", "model": "m", "api_key_env": "K"}),
        (["local", "--expert-model", "dir"], {"kind": "local", "model": "dir"}),
        (["recorded", "--expert-replay", "f"], {"kind": "recorded", "path": "f"}),
    ],
    ids=["calculator", "openai", "local", "recorded"],
)  # fmt: skip
def test_eval_builds_the_expert_that_was_named(module, words, settings):
    from eapo_fast.cli_evaluation import _expert

    module("eapo_fast.run_config", build_expert=lambda given: given)
    line = ["eval", "--model", "m", "--data", "d", "--assisted", "--expert", *words]
    assert _expert(cli._parser().parse_args(line)) == settings


@pytest.mark.parametrize(
    ("kind", "option"),
    [("openai", "--expert-url"), ("local", "--expert-model"), ("recorded", "--expert-replay")],
)
def test_what_an_expert_lacks_is_named_as_the_option(kind, option):
    from eapo_fast.cli_evaluation import _expert

    line = ["eval", "--model", "m", "--data", "d", "--assisted", "--expert", kind]
    with pytest.raises(ConfigError, match=option):
        _expert(cli._parser().parse_args(line))


def test_table_and_distill_hand_their_options_on(module, tmp_path, capsys):
    seen = []

    def write_table(folders, out):
        seen.append((folders, out))
        (tmp_path / "table.md").write_text("rows")
        return tmp_path / "table.md"

    def distill(model, data, out, settings, **options):
        seen.append((model, data, out, settings["lora"], settings["max_steps"]))
        return {"steps": 7, "loss_last": 0.25}

    module("eapo_fast.evaluation.table", write_table=write_table)
    module("eapo_fast.distillation", distill=distill, DistillSettings=dict,
           collect_solutions=None)  # fmt: skip
    assert cli.main(["table", "a", "b", "--out", "x"]) == 0
    words = ["--model", "m", "--data", "d", "--out", "o", "--lora", "8", "--max-steps", "7"]
    assert cli.main(["distill", *words]) == 0
    assert seen == [(["a", "b"], "x"), ("m", "d", "o", 8, 7)]
    out = capsys.readouterr().out
    assert out.startswith("rows\nwritten: ")
    assert "loss_last      0.2500" in out


def test_the_options_of_eval_are_the_settings_of_an_evaluation():
    pytest.importorskip("torch")
    from dataclasses import fields

    from eapo_fast.cli_evaluation import _METHODS, _PASSED
    from eapo_fast.evaluation import METHODS, EvalSettings

    assert set(_PASSED) == {field.name for field in fields(EvalSettings)}
    assert list(_METHODS) == list(METHODS)
    parser = cli._parser()
    given = vars(parser.parse_args(["eval", "--model", "m", "--data", "d"]))
    assert EvalSettings(**{name: given[name] for name in _PASSED}) == EvalSettings()


def test_rollouts_prints_the_path_of_the_page(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert cli.main(["rollouts", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert cli.main(["rollouts", str(tmp_path / "absent")]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_compare_hands_everything_on(module):
    seen = []
    module("eapo_fast.demo.compare", main=seen.append)
    assert cli.main(["compare", "--seeds", "3"]) == 0
    assert seen == [["--seeds", "3"]]


def test_info_names_versions_isa_and_backends(capsys):
    pytest.importorskip("torch")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("eapo_fast", "python", "torch", "transformers", "triton", "flash-attn",
                 "native core", "CUDA devices", "backends"):  # fmt: skip
        assert f"\n{word} " in f"\n{out}"


def test_info_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from eapo_fast.cli import main; raise SystemExit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "unknown (torch not installed)" in done.stdout


def test_info_lists_the_environment(capsys):
    assert cli.main(["info", "--env"]) == 0
    assert "`EAPO_FAST_DEBUG`" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """As in `eapo-fast consults RUN | head -1`."""
    from eapo_fast.experts.lines import sealed

    line = {
        "kind": "consult", "id": "1/0/0/0/0", "status": "ok", "query": "q" * 40, "latency": 1.0,
        "charged": 0.1, "usage": [1, 1, 0.1], "expert": None, "source": "expert", "leak": None,
        "attempts": [], "detail": "",
    }  # fmt: skip
    lines = [sealed({**line, "id": f"1/{i}/0/0/0"}) + "\n" for i in range(3000)]
    (tmp_path / "consults.jsonl").write_text("".join(lines))
    command = [sys.executable, "-m", "eapo_fast.cli", "consults", str(tmp_path), "--top", "3000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().startswith("3000 consults")
    child.stdout.close()
    assert (child.stderr.read(), child.wait(30)) == ("", 0)
    child.stderr.close()
