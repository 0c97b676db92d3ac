"""Every token that the engine put in belongs to exactly one line, and back; kills included."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from eapo_fast import EAPOConfig, Trainer
from eapo_fast.cli import main
from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.errors import DataError
from eapo_fast.experts import (
    Budget,
    Calculator,
    ConsultRequest,
    ExpertReply,
    Function,
    OpenAICompatible,
    Usage,
)
from eapo_fast.experts.lines import digest, read_sealed, sealed, unsealed
from eapo_fast.rollout import ConsultProtocol, Rollout
from eapo_fast.rollout.provenance import spans_of
from eapo_fast.training.consult_log import ConsultLog
from eapo_fast.training.generation import Generation


def answer(request: ConsultRequest) -> ExpertReply:
    """The calculator's answer; every fifth rollout gets a failure."""
    if request.rollout % 5 == 4:
        return ExpertReply.failed("refused", "not today")
    return ExpertReply(Calculator().reply(request.query).text or "?", Usage(7, 2, 0.001), "calc-1")


class Run:
    """A short training run of the demo's policy and the rollouts that it trained on."""

    def __init__(self, folder: Path, expert: Any = None, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "recipe": "eapo",
            "run_name": "short",
            "max_steps": 2,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "consult_prompt": "",
            "max_completion_length": 70,
            "max_turns": 4,
            "turn_contraction": 0,
            "consult_schedule_offset": 1,
            "logging_steps": 1,
            "save_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        self.generations: list[Generation] = []
        self.trainer = Trainer(
            str(POLICY),
            ["exact"],
            EAPOConfig(**(settings | changes), output_dir=str(folder)),
            build_dataset("train", 12, 0, steps=(4, 5)),
            build_dataset("test", 8, 0, steps=(4, 5)),
            expert=expert or Function(answer, immediate=True, max_cost=0.01),
            protocol=ConsultProtocol(),
        )

    def train(self, resume: bool = False) -> list[Generation]:
        whole = Generation.kept
        seen = self.generations

        def kept(generation: Generation) -> list[int]:
            if not any(known is generation for known in seen):
                seen.append(generation)
            return whole(generation)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Generation, "kept", kept)
            self.trainer.train(resume_from_checkpoint=resume)
        return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Generation]]:
    folder = tmp_path_factory.mktemp("provenance")
    return folder, Run(folder).train()


def place(line: dict[str, Any]) -> tuple[int, int, int]:
    return line["step"], line["prompt"], line["rollout"]


def check_lines(lines: list[dict[str, Any]], step: int, rollouts: list[Rollout]) -> int:
    """Segments and lines of a step map to each other one to one; returns the spans checked."""
    lines = [line for line in lines if line["step"] == step and line["kind"] != "expert"]
    assert len({line["id"] for line in lines}) == len(lines)
    checked = 0
    for rollout in rollouts:
        mine = [
            one for one in lines if place(one) == (step, rollout.prompt_id, rollout.sample_index)
        ]
        segments = [tuple(line["segment"]) for line in mine]
        assert sorted(set(segments)) == spans_of(rollout)
        last = 0
        for line in mine:
            start, stop = line["span"]
            assert line["segment"][0] <= start <= stop <= line["segment"][1]
            assert start >= last
            last = stop
            ids = np.asarray(rollout.token_ids[start:stop], dtype="<i8")
            assert line["tokens"] == digest(ids.tobytes())
            checked += 1
        lines = [line for line in lines if line not in mine]
    assert lines == []
    return checked


def test_spans_and_lines_map_to_each_other(run: tuple[Path, list[Generation]]) -> None:
    folder, generations = run
    lines = read_sealed(folder / "consults.jsonl")
    spans = [check_lines(lines, s, g.rollouts) for s, g in enumerate(generations, 1)]
    assert sum(spans) > 20
    consults = [line for line in lines if line["kind"] == "consult"]
    statuses = {line["status"] for line in consults}
    assert {"ok", "declined", "refused"} <= statuses
    for line in consults:
        assert line["reply"] == digest(line["text"])
        sent = line["source"] == "expert"
        assert bool(line["attempts"]) == (sent or line["source"] == "merged")
    assert lines[0]["kind"] == "expert"


def test_a_changed_byte_in_any_place_is_found(run: tuple[Path, list[Generation]]) -> None:
    text = (run[0] / "consults.jsonl").read_text().splitlines()[1]
    assert unsealed(text)
    for position in range(0, len(text), 7):
        other = "7" if text[position] != "7" else "8"
        with pytest.raises(DataError):
            unsealed(text[:position] + other + text[position + 1 :])
    with pytest.raises(DataError):
        unsealed(text[:-5])


def test_a_torn_tail_is_left_out_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "consults.jsonl"
    whole = [sealed({"kind": "consult", "step": i, "id": str(i)}) for i in range(3)]
    path.write_text("\n".join(whole) + "\n" + whole[0][:30])
    assert len(read_sealed(path)) == 3
    path.write_text("\n".join([whole[0], whole[1][:30], whole[2]]) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_sealed(path)


def test_after_a_kill_at_any_byte_the_lines_are_those_of_the_checkpoint(
    run: tuple[Path, list[Generation]], tmp_path: Path
) -> None:
    """100 kills: the file is cut anywhere, the run resumes after step 1 and writes step 2 again."""
    folder, generations = run
    whole = (folder / "consults.jsonl").read_bytes()
    first = b"".join(
        line + b"\n" for line in whole.splitlines() if unsealed(line.decode())["step"] <= 1
    )
    path = tmp_path / "consults.jsonl"

    class Desk:
        expert = Function(answer, immediate=True)

    for kill in range(100):
        size = len(first) + (len(whole) - len(first)) * kill // 99
        path.write_bytes(whole[:size])
        log = ConsultLog(path, "short", resume_step=1)
        log.write(2, generations[1], Desk())  # type: ignore[arg-type]
        log.close()
        lines = read_sealed(path)
        for step, generation in enumerate(generations, 1):
            check_lines(lines, step, generation.rollouts)


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    straight = Run(tmp_path / "a", save_strategy="steps").train()
    short = Run(tmp_path / "b", max_steps=2)
    short.train()
    for path in (tmp_path / "b" / "checkpoint-2").iterdir():
        path.unlink()
    (tmp_path / "b" / "checkpoint-2").rmdir()
    again = Run(tmp_path / "b", max_steps=2)
    again.train(resume=True)
    lines = read_sealed(tmp_path / "b" / "consults.jsonl")
    for step, generation in enumerate(straight, 1):
        check_lines(lines, step, generation.rollouts)


def test_the_command_shows_and_replays(
    run: tuple[Path, list[Generation]], capsys: pytest.CaptureFixture[str], chat: ModuleType
) -> None:
    folder = run[0]
    assert main(["consults", str(folder), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("slowest", "dearest", "failed ("))
    assert "not today" in shown
    lines = [one for one in read_sealed(folder / "consults.jsonl") if one["kind"] == "consult"]
    for status in ("ok", "declined", "refused"):
        line = next(one for one in lines if one["status"] == status)
        assert main(["consults", str(folder), "--replay", line["id"]]) == 0
        out = capsys.readouterr().out
        assert line["query"] in out
        assert "the same reply to the byte" in out
    with chat.ChatServer(answer=lambda body: "live answer") as server:
        words = ["--replay", line["id"], "--expert-url", server.url, "--expert-model", "m"]
        assert main(["consults", str(folder), *words]) == 0
    assert "live answer" in capsys.readouterr().out
    assert main(["consults", str(folder), "--replay", "9/9/9/9/9"]) == 2
    assert main(["consults", str(folder / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_metrics_of_leaks_reliance_and_the_queue(run: tuple[Path, list[Generation]]) -> None:
    rows = [json.loads(t) for t in (run[0] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0.0 <= row["expert/leak_rate"] <= 1.0
        for name in ("latency_p50", "latency_p90", "latency_p99", "shared_share", "hedges"):
            assert f"expert/{name}" in row
    assert sum("expert/reliance" in row for row in rows) <= 1


def test_training_and_assisted_evaluation_share_one_budget(tmp_path: Path) -> None:
    short = Run(tmp_path, max_steps=1, expert_budget=Budget(consults=40), save_strategy="no")
    short.train()
    spent = short.trainer.ledger.total().consults
    assert 0 < spent <= 40
    for _ in range(3):
        short.trainer.evaluate(assisted=True)
    assert spent < short.trainer.ledger.total().consults <= 40


def test_a_run_that_died_counts_what_it_paid_after_its_checkpoint(tmp_path: Path) -> None:
    import shutil

    calls: list[str] = []

    def fn(request: ConsultRequest) -> ExpertReply:
        calls.append(request.query)
        return answer(request)

    settings = {"expert_budget": Budget(consults=400), "expert_dedup": "off"}
    Run(tmp_path, Function(fn, immediate=True), **settings).train()
    before = len(calls)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = Run(tmp_path, Function(fn, immediate=True), **settings)
    again.train(resume=True)
    assert again.trainer.ledger.total().consults == len(calls) > before > 0


def test_caps_per_step_start_anew_in_each_assisted_evaluation(tmp_path: Path) -> None:
    budget = Budget(consults=3, per="step")
    short = Run(tmp_path, max_steps=1, expert_budget=budget, save_strategy="no")
    got = [short.trainer.evaluation(assisted=True) for _ in range(2)]
    accepted = [sum(c.accepted for r in e.rollouts for c in r.consults) for e in got]
    assert accepted[0] == accepted[1] > 0


@pytest.mark.parametrize("choice", ["keep", "mask", "drop_group", "stop"])
def test_mass_failure_does_what_was_chosen(tmp_path: Path, choice: str) -> None:
    def down(request: ConsultRequest) -> ExpertReply:
        return ExpertReply.failed("down", "gone", retry=False)

    short = Run(
        tmp_path,
        Function(down, immediate=True),
        max_steps=1,
        save_strategy="no",
        expert_failure=choice,
        recipe="grpo",
    )
    if choice == "stop":
        with pytest.raises(Exception, match="expert_failure is stop"):
            short.train()
        return
    [generation] = short.train()
    hit = [any(c.status == "down" for c in r.consults) for r in generation.rollouts]
    assert any(hit)
    groups = {r.group_id for r, h in zip(generation.rollouts, hit, strict=True) if h}
    for rollout, was_hit, used in zip(generation.rollouts, hit, generation.trained, strict=True):
        lost = {"keep": False, "mask": was_hit, "drop_group": rollout.group_id in groups}[choice]
        assert used == (not lost)


def test_a_key_that_is_refused_is_a_failure_of_the_expert(tmp_path: Path) -> None:
    def locked(request: ConsultRequest) -> ExpertReply:
        return ExpertReply.failed("refused", "HTTP 401", billed=False, unfit=True)

    short = Run(
        tmp_path,
        Function(locked, immediate=True),
        max_steps=1,
        save_strategy="no",
        expert_failure="stop",
    )
    with pytest.raises(Exception, match=r"expert_failure is stop"):
        short.train()


def test_a_planted_key_does_not_reach_the_lines(
    tmp_path: Path, chat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "sk-planted-key-0123456789")
    with chat.ChatServer(answer=lambda body: "your key is sk-planted-key-0123456789") as server:
        expert = OpenAICompatible(server.url, "m", api_key_env="PLANTED")
        Run(
            tmp_path,
            expert,
            max_steps=1,
            expert_record=str(tmp_path / "record.jsonl"),
            expert_cache=str(tmp_path / "cache.sqlite"),
        ).train()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "consults.jsonl" for p in files)
    assert [p.name for p in files if b"planted-key" in p.read_bytes()] == []
