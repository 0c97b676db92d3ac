"""A run that dies does not buy the replies of its unfinished step again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eapo_fast.experts import (
    Budget,
    Calculator,
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    ExpertReply,
    Function,
    Recorded,
    Usage,
)
from eapo_fast.experts.kept import KeptReplies


def desk(
    path: Path, after: int | None, calls: list[str], identity: str = "one"
) -> ConsultScheduler:
    def fn(request: ConsultRequest) -> ExpertReply:
        calls.append(request.query)
        if request.query == "bad":
            return ExpertReply.failed("refused")
        return ExpertReply(f"{request.query} answer {len(calls)}", Usage(1, 1))

    made = ConsultScheduler(
        Function(fn, identity=identity), ConsultPolicy(dedup="off"), Budget(consults=100)
    )
    made.keep_replies(path, after=after)
    return made


def ask(one: ConsultScheduler, query: str, step: int, rollout: int = 0) -> ConsultResult:
    return one.submit(ConsultRequest(query, step=step, rollout=rollout)).result(5.0)


def test_only_equal_questions_at_equal_places_after_the_checkpoint(tmp_path: Path) -> None:
    path, calls = tmp_path / "sub" / "replies.jsonl", []
    with desk(path, None, calls) as one:
        ask(one, "a", 1)
        one.checkpointed()
        first = [ask(one, "b", 2, rollout).text for rollout in range(3)]
        ask(one, "bad", 2, 7)
    before = len(calls)
    for life in range(3):  # a run may die again, and again
        with desk(path, 1, calls) as again:
            assert [ask(again, "b", 2, rollout).text for rollout in range(3)] == first
            assert ask(again, "b", 2, 0).status == "cached"
            assert again.ledger.total().consults == 0
            assert len(calls) == before
        if life == 1:
            with path.open("a") as file:
                file.write('{"key": "cut')
    with desk(path, 1, calls) as again:
        statuses = [
            ask(again, "b", 2, 9).status,
            ask(again, "c", 2, 0).status,
            ask(again, "bad", 2, 7).status,
            ask(again, "a", 1).status,
        ]
    assert statuses == ["ok", "ok", "refused", "ok"]
    with desk(path, 2, calls) as later:
        assert ask(later, "b", 2, 0).status == "ok"
    with desk(path, 1, calls, identity="another") as other:
        assert ask(other, "b", 2, 0).status == "ok"
    with desk(path, None, calls) as fresh:
        assert ask(fresh, "b", 2, 0).status == "ok"


def test_damage_costs_the_replies_and_nothing_else(tmp_path: Path) -> None:
    path, calls = tmp_path / "replies.jsonl", []
    with desk(path, None, calls) as one:
        ask(one, "a", 1)
        ask(one, "b", 1)
    path.write_text(path.read_text().replace("answer 1", "answer 9"))
    with desk(path, 0, calls) as again:
        assert ask(again, "a", 1).text == "a answer 3"
    assert len(KeptReplies(path, 0)) == 1


def test_a_disk_that_refuses_one_file_loses_nothing_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    policy = ConsultPolicy(record=tmp_path / "record.jsonl")
    with ConsultScheduler(Function(lambda request: "x"), policy) as one:
        one.keep_replies(tmp_path / "replies.jsonl", after=None)
        monkeypatch.setattr(KeptReplies, "put", full)
        assert ask(one, "a", 1).text == "x"
    assert "No space left" in caplog.text
    assert len(Recorded(tmp_path / "record.jsonl")) == 1


def test_experts_in_the_process_keep_nothing(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    with ConsultScheduler(Calculator()) as one:
        one.keep_replies(path, after=None)
        assert ask(one, "1+1", 1).text == "2"
        one.checkpointed()
    assert not path.exists()


PROGRAM = """
import json, os, sys, time
from eapo_fast import EAPOConfig, Trainer
from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.experts import Budget, Calculator, ExpertReply, Function, Usage
from eapo_fast.rollout import ConsultProtocol

folder, resume = sys.argv[1], sys.argv[2] == "resume"
calculator, asked = Calculator(), open(os.path.join(folder, "asked"), "a")
late = []

def fn(request):
    late.extend([request] * (request.step > 1))
    asked.write(json.dumps(request.place) + "\\n")
    asked.flush()
    if not resume and len(late) == 6:
        time.sleep(0.3)  # replies that are there are read meanwhile
        os.kill(os.getpid(), 9)
    return ExpertReply(calculator.reply(request.query).text or "?", Usage(2, 2))

args = EAPOConfig(
    recipe="eapo", learning_rate=1e-3, warmup_steps=0, max_steps=2, num_generations=8,
    logging_steps=1, turn_contraction=0.0,
    per_device_train_batch_size=16, consult_prompt="", max_completion_length=60, max_turns=4,
    consult_schedule="constant", expert_dedup="off", save_steps=1, disable_tqdm=True,
    use_cpu=True, expert_budget=Budget(consults=1000), output_dir=os.path.join(folder, "run"),
)
trainer = Trainer(
    str(POLICY), ["exact"], args, build_dataset("train", 12, 0, steps=(4, 5)),
    expert=Function(fn, max_workers=1, identity="calculator"), protocol=ConsultProtocol(),
)
trainer.train(resume_from_checkpoint=resume)
print(json.dumps({
    "spent": trainer.ledger.total().consults,
    "cached": sum(row.get("expert/cached", 0) for row in trainer.state.log_history),
}))
"""


def test_a_killed_training_run_buys_no_reply_twice(tmp_path: Path) -> None:
    """kill -9 in the middle of step 2; the one consult under way is the only one asked again."""

    def life(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert life("fresh").returncode == -signal.SIGKILL
    done = life("resume")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(asked) - len(set(asked)) <= 1
    assert result["cached"] >= 5
    assert result["spent"] >= len(asked)
