"""Evaluations end to end on the embedded policy: results, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eapo_fast.cli import main
from eapo_fast.errors import ConfigError, DataError, ModelError
from eapo_fast.evaluation import EvalSettings, evaluate_model
from eapo_fast.evaluation.store import PROBLEMS, read_lines, read_result
from eapo_fast.evaluation.table import write_table
from eapo_fast.experts import Calculator, ConsultRequest, Function, Recorded
from eapo_fast.rewards import verify

Quick = Callable[..., EvalSettings]


class Stopped(Exception):
    """An interruption after a chunk."""


def stop_after(problems: int) -> Callable[..., None]:
    def progress(records: list[Any], *_: Any) -> None:
        if len(records) >= problems:
            raise Stopped

    return progress


def test_an_evaluation_reports_what_its_records_hold(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    result = evaluate_model(policy, problems, tmp_path / "out", quick())
    stored, records = read_result(tmp_path / "out")
    assert stored == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 10_000
    assert [r["index"] for r in records] == list(range(10))
    results = result["results"]
    correct = np.array([r["correct"] for r in records], dtype=float)
    assert results["mean_at_n"]["value"] == pytest.approx(correct.mean())
    assert results["any_at_n"]["value"] == pytest.approx(correct.any(axis=1).mean())
    assert results["var"]["value"] == pytest.approx(correct.var(axis=1).mean())
    assert results["mean_at_n"]["low"] <= correct.mean() <= results["mean_at_n"]["high"]
    assert len(results["any_at_k"]) == 4
    assert 0.0 < correct.mean() < 1.0, "the problems should tell something"
    for record in records:
        for text, right in zip(record["texts"], record["correct"], strict=True):
            assert verify(text, record["gold"]).correct == bool(right)
            assert "<consult>" not in text
    assert [g["value"] for g in results["by"]["steps"]] == [2, 3]
    assert sum(g["problems"] for g in results["by"]["steps"]) == 10
    assert results["consults"]["asked_per_sample"] == 0.0


@pytest.mark.parametrize("assisted", [False, True], ids=["solo", "assisted"])
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(
    policy: str, problems: Path, tmp_path: Path, quick: Quick, assisted: bool
) -> None:
    def run(folder: str, **options: Any) -> dict[str, Any]:
        expert = Calculator() if assisted else None
        return evaluate_model(
            policy, problems, tmp_path / folder, quick(), expert=expert, **options
        )

    whole = run("whole")
    with pytest.raises(Stopped):
        run("cut", progress=stop_after(3))
    assert len(read_lines(tmp_path / "cut" / PROBLEMS)) == 3
    with pytest.raises(ConfigError, match="an unfinished evaluation"):
        read_result(tmp_path / "cut")
    with pytest.raises(Stopped):
        run("cut", progress=stop_after(9))
    with (tmp_path / "cut" / PROBLEMS).open("a") as file:
        file.write('{"index": 9, "torn')
    cut = run("cut")
    assert cut["results"] == whole["results"]
    texts = [(tmp_path / f / PROBLEMS).read_bytes() for f in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert (whole["results"]["consults"]["asked_per_sample"] > 0) == assisted


def test_a_killed_command_goes_on_to_the_same_bytes(
    policy: str, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kill -9` after the first chunk, then the same command again."""

    def words(folder: str) -> list[str]:
        return [
            "eval", "--model", policy, "--data", str(problems), "--out", str(tmp_path / folder),
            "--n", "2", "--chunk", "1", "--max-tokens", "60", "--temperature", "1", "--cpu",
        ]  # fmt: skip

    code = (
        "import os, signal\n"
        "from eapo_fast.cli import main\n"
        "from eapo_fast.evaluation import report\n"
        "def killing(file): return lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "report.progress_line = killing\n"
        f"main({words('cut')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(read_lines(tmp_path / "cut" / PROBLEMS)) == 1
    assert main(words("cut")) == main(words("whole")) == 0
    texts = [(tmp_path / f / PROBLEMS).read_bytes() for f in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert len(read_lines(tmp_path / "cut" / "timing.jsonl")) == 10
    assert "mean@2" in capsys.readouterr().out


def test_a_torn_chunk_is_sampled_again(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    whole = evaluate_model(policy, problems, tmp_path / "out", quick())
    path = tmp_path / "out" / PROBLEMS
    text = path.read_bytes()
    path.write_bytes(text[: int(len(text) * 0.55)])
    seen: list[int] = []
    again = evaluate_model(
        policy, problems, tmp_path / "out", quick(), progress=lambda r, *_: seen.append(len(r))
    )
    assert seen[-1] == 10
    firsts = [t["first"] for t in read_lines(tmp_path / "out" / "timing.jsonl")]
    assert firsts == [0, 3, 6, 9]
    assert path.read_bytes() == text
    assert again["results"] == whole["results"]


@pytest.mark.parametrize("assisted", [False, True], ids=["solo", "assisted"])
def test_chunks_and_other_problems_do_not_change_a_sample(
    policy: str, problems: Path, tmp_path: Path, quick: Quick, assisted: bool
) -> None:
    """Draws are keyed by problem and sample: only rounding could tell batches apart."""
    found = []
    for name, changes in (("a", {}), ("b", {"chunk": 10}), ("c", {"chunk": 4, "limit": 7})):
        expert = Calculator() if assisted else None
        evaluate_model(policy, problems, tmp_path / name, quick(**changes), expert=expert)
        found.append([r["texts"] for r in read_lines(tmp_path / name / PROBLEMS)])
    assert found[0] == found[1]
    assert found[0][:7] == found[2]
    assert len({tuple(texts) for texts in found[0]}) == 10


def test_a_finished_evaluation_is_not_sampled_again(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    first = evaluate_model(policy, problems, tmp_path / "out", quick())
    again = evaluate_model(policy, problems, tmp_path / "out", quick(), progress=stop_after(0))
    assert again == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature was 1.0 and is 0.7"),
        ({"n": 2, "seed": 5}, "n was 4 and is 2; seed was 0 and is 5"),
        ({"limit": 5}, "problems was 10 and is 5; data changed"),
        ({"system_prompt": "Think."}, "prompts and expert changed"),
    ],
    ids=["setting", "two settings", "fewer problems", "prompt"],
)
def test_another_setting_is_refused(
    policy: str, problems: Path, tmp_path: Path, quick: Quick, changes: Any, message: str
) -> None:
    with pytest.raises(Stopped):
        evaluate_model(policy, problems, tmp_path / "out", quick(), progress=stop_after(3))
    with pytest.raises(ConfigError, match="holds another evaluation") as refusal:
        evaluate_model(policy, problems, tmp_path / "out", quick(**changes))
    assert message in str(refusal.value)
    assert "--restart" in str(refusal.value)
    result = evaluate_model(policy, problems, tmp_path / "out", quick(**changes), restart=True)
    assert result["results"]["problems"] in (5, 10)
    assert len(read_lines(tmp_path / "out" / "old" / PROBLEMS)) == 3


def test_another_model_and_other_data_are_refused(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    options = {"processing_class": tokenizer, "use_cpu": True}
    evaluate_model(model, problems, tmp_path / "out", quick(limit=3), **options)
    model.get_input_embeddings().weight.data[3, 3] += 1e-3
    with pytest.raises(ConfigError, match="holds another evaluation: model changed"):
        evaluate_model(model, problems, tmp_path / "out", quick(limit=3), **options)
    lines = problems.read_text().splitlines()
    problems.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ConfigError, match="model changed; data changed"):
        evaluate_model(model, problems, tmp_path / "out", quick(limit=3), **options)


def test_a_folder_has_one_evaluation_at_a_time(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    def intrude(*_: Any) -> None:
        with pytest.raises(ConfigError, match="in use by another evaluation"):
            evaluate_model(policy, problems, tmp_path / "out", quick(limit=3))

    evaluate_model(policy, problems, tmp_path / "out", quick(limit=3), progress=intrude)


def test_files_that_were_changed_are_told(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    evaluate_model(policy, problems, tmp_path / "out", quick())
    path = tmp_path / "out" / PROBLEMS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(DataError, match="not in order"):
        evaluate_model(policy, problems, tmp_path / "out", quick())
    path.write_text("{\n" + "".join(lines))
    with pytest.raises(DataError, match=r"problems.jsonl:1: not a JSON object"):
        evaluate_model(policy, problems, tmp_path / "out", quick())


def test_consults_are_counted_by_what_became_of_them(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    refusing = Function(lambda request: "" if "*" in request.query else "7", identity="sevens")
    result = evaluate_model(policy, problems, tmp_path / "out", quick(n=8), expert=refusing)
    consults = result["results"]["consults"]
    records = read_lines(tmp_path / "out" / PROBLEMS)
    each = [c for r in records for c in r.get("consults", [])]
    assert sum(consults["by_status"].values()) == sum(c["asked"] for c in each) > 0
    assert consults["asked_per_sample"] == pytest.approx(sum(c["asked"] for c in each) / 80)
    assert consults["accepted_share"] == pytest.approx(
        sum(c["accepted"] for c in each) / sum(c["asked"] for c in each)
    )
    assert sum(kind["samples"] for kind in consults["accuracy"].values()) == 80
    assert all("<consult>" in r["texts"][i] for r in records
               for i, c in enumerate(r.get("consults", [])) if c["asked"])  # fmt: skip


def test_the_expert_reads_the_problem(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    seen: list[ConsultRequest] = []

    def answer(request: ConsultRequest) -> str:
        seen.append(request)
        return "1"

    evaluate_model(policy, problems, tmp_path / "out", quick(), expert=Function(answer))
    prompts = [json.loads(line)["prompt"] for line in problems.read_text().splitlines()]
    assert seen
    assert all(request.problem == prompts[request.prompt] for request in seen)


def test_recorded_replies_give_the_same_evaluation(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    record = tmp_path / "consults.jsonl"
    answered = Function(lambda request: str(len(request.query)), identity="lengths", immediate=True)
    first = evaluate_model(
        policy, problems, tmp_path / "a", quick(), expert=answered, expert_record=record
    )
    again = evaluate_model(policy, problems, tmp_path / "b", quick(), expert=Recorded(record))
    assert again["results"] == first["results"]
    assert again["results"]["consults"]["accepted_per_sample"] > 0


def test_a_recording_that_went_on_after_an_interruption_is_replayed(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    options: dict[str, Any] = {"expert": Calculator(), "expert_record": tmp_path / "consults.jsonl"}
    with pytest.raises(Stopped):
        evaluate_model(policy, problems, tmp_path / "a", quick(), progress=stop_after(6), **options)
    first = evaluate_model(policy, problems, tmp_path / "a", quick(), **options)
    recorded = Recorded(tmp_path / "consults.jsonl")
    with pytest.raises(Stopped):
        evaluate_model(
            policy, problems, tmp_path / "b", quick(), expert=recorded, progress=stop_after(3)
        )
    again = evaluate_model(policy, problems, tmp_path / "b", quick(), expert=recorded)
    assert again["results"] == first["results"]
    assert again["results"]["consults"]["accepted_per_sample"] > 0


def test_an_expert_that_cannot_be_reached_ends_it_before_sampling(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    class Down(Calculator):
        def probe(self) -> str:
            return "no route to host"

    with pytest.raises(ConfigError, match="no route to host"):
        evaluate_model(policy, problems, tmp_path / "out", quick(), expert=Down())
    assert not (tmp_path / "out" / PROBLEMS).exists()


@pytest.mark.parametrize("place", ["runs/slip", "a file"])
def test_a_model_that_cannot_be_on_the_hub_is_told_at_once(
    problems: Path, tmp_path: Path, quick: Quick, place: str
) -> None:
    model = str(problems) if place == "a file" else place
    with pytest.raises(ModelError, match="is a file" if place == "a file" else "does not exist"):
        evaluate_model(model, problems, tmp_path / "out", quick())


def test_methods_and_experts_must_agree(policy: str, problems: Path, quick: Quick) -> None:
    with pytest.raises(ConfigError, match="workflow consults an expert"):
        evaluate_model(policy, problems, settings=quick(method="workflow"))
    with pytest.raises(ConfigError, match="eapo is measured without an expert"):
        evaluate_model(policy, problems, settings=quick(method="eapo"), expert=Calculator())
    with pytest.raises(ConfigError, match="Did you mean 'workflow'"):
        quick(method="workflw")
    with pytest.raises(ConfigError, match="n: got 0"):
        quick(n=0)


def test_unreadable_golds_are_listed_before_work_starts(
    policy: str, tmp_path: Path, quick: Quick
) -> None:
    rows = [{"problem": "a=1+1?", "answer": "2"}, {"problem": "a=1+2?", "answer": "\\frac{"}]
    with pytest.warns(UserWarning, match=r"1 of 2 reference answers.*\n  row 1"):
        evaluate_model(policy, rows, tmp_path / "out", quick())
    with pytest.raises(DataError, match="evaluation needs a value in column 'answer'"):
        evaluate_model(policy, [*rows, {"problem": "a=1+3?"}], tmp_path / "none", quick())
    assert not (tmp_path / "none").exists()


def test_tables_pair_evaluations_by_problem(
    policy: str, problems: Path, tmp_path: Path, quick: Quick
) -> None:
    out = [tmp_path / name for name in ("base", "workflow", "other")]
    evaluate_model(policy, problems, out[0], quick(method="base"))
    evaluate_model(policy, problems, out[1], quick(method="workflow"), expert=Calculator())
    page = write_table(out[:2], tmp_path / "table").read_text()
    rows = json.loads((tmp_path / "table" / "table.json").read_text())
    assert [row["title"] for row in rows] == ["Base model", "Expert-assisted workflow"]
    difference = rows[1]["mean_at_n"]["value"] - rows[0]["mean_at_n"]["value"]
    assert rows[1]["gain"]["value"] == pytest.approx(difference)
    assert f"{100 * difference:+.1f}" in page
    assert (tmp_path / "table" / "table.png").stat().st_size > 10_000
    evaluate_model(policy, problems, out[2], quick(n=2, limit=4))
    with pytest.raises(ConfigError, match="cannot be compared: other problems, n 4 and 2"):
        write_table([out[0], out[2]], tmp_path / "table")
    lines = (out[1] / PROBLEMS).read_bytes()
    (out[1] / PROBLEMS).write_bytes(lines[: lines.index(b"\n") + 1])
    with pytest.raises(DataError, match=r"got 1 problems, evaluation\.json has 10"):
        write_table(out[:2], tmp_path / "table")
    shutil.rmtree(out[1])
    with pytest.raises(ConfigError, match="holds no evaluation"):
        write_table(out[:2], tmp_path / "table")
