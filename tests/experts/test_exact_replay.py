"""A recorded training run over HTTP, with an expert of varying delay, replays to the bit."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eapo_fast import EAPOConfig, Sampler, SamplerConfig, SamplingParams, Trainer
from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.experts import (
    Calculator,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    Expert,
    Function,
    OpenAICompatible,
    Recorded,
    ReplayMismatch,
)
from eapo_fast.experts.lines import unsealed
from eapo_fast.rollout import ConsultProtocol, collect_rollouts
from eapo_fast.training.generation import Generation

STEPS = 2


def slow_calculator(body: dict[str, Any]) -> str:
    """The calculator's answer after 1 to 40 ms, drawn anew in every run."""
    time.sleep(random.SystemRandom().uniform(0.001, 0.04))
    query = body["messages"][-1]["content"].rsplit("\n", 1)[-1]
    return Calculator().reply(query).text or "unreadable"


def train(folder: Path, expert: Expert, monkeypatch: Any, **changes: Any) -> dict[str, Any]:
    """Weights, losses and tokens of a short run of the demo's policy."""
    settings: dict[str, Any] = {
        "recipe": "eapo",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "sampler_max_batch": 8,
        "consult_prompt": "",
        "max_completion_length": 60,
        "max_turns": 4,
        "consult_schedule_offset": 20,
        "expert_timeout": 10.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    tokens: list[list[int]] = []
    ticks: list[int] = []
    whole = Generation.kept

    def kept(self: Generation) -> list[int]:
        tokens.extend(r.token_ids.tolist() for r in self.rollouts)
        ticks.extend(i.tick for r in self.rollouts for i in r.injections)
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "kept", kept)
        trainer = Trainer(
            str(POLICY),
            ["exact"],
            EAPOConfig(**(settings | changes), output_dir=str(folder)),
            build_dataset("train", 12, 0, steps=(4, 5)),
            expert=expert,
            protocol=ConsultProtocol(),
        )
        trainer.train()
    logs = trainer.state.log_history
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "losses": [row["loss"] for row in logs],
        "asked": sum(row["expert/asked"] for row in logs),
        "tokens": tokens,
        "ticks": ticks,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = all(torch.equal(w, b["weights"][n]) for n, w in a["weights"].items())
    return weights and all(a[k] == b[k] for k in ("losses", "tokens", "ticks"))


@pytest.fixture(scope="module")
def recorded(chat: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A recording and what the run that wrote it came to."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "consults.jsonl"
    with pytest.MonkeyPatch.context() as patch, chat.ChatServer(answer=slow_calculator) as server:
        expert = OpenAICompatible(server.url, "m")
        first = train(folder / "run", expert, patch, expert_record=str(path))
    return path, first


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a replay opened a socket")


def test_a_recorded_run_replays_to_the_bit_without_a_socket(
    recorded: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = recorded
    assert first["asked"] > 20
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    absent = OpenAICompatible("http://127.0.0.1:1/v1", "m")
    for name in ("once", "twice"):
        again = train(tmp_path / name, absent, monkeypatch, expert_replay=str(path))
        assert same(again, first)


def test_a_replay_that_goes_another_way_is_an_error(
    recorded: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = recorded
    with pytest.raises(ReplayMismatch, match="eplay"):
        train(tmp_path / "seed", Calculator(), monkeypatch, expert_replay=str(path), seed=5)


def test_every_line_of_a_recording_is_sealed_and_tells_its_ticks(
    recorded: tuple[Path, Any],
) -> None:
    path, first = recorded
    lines = [unsealed(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "begin"] == [1, 2]
    joined = [line["tick"] for line in lines for _ in line.get("inject", ())]
    assert joined
    assert set(joined) <= set(first["ticks"])
    waits = sum(len(line.get("waits", ())) for line in lines)
    assert waits == len(joined)
    assert sum(line["kind"] == "consult" for line in lines) == first["asked"]


def test_both_gates_give_the_same_rollouts_from_a_recorded_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with the gate after the reply, so that every reply is there; drawn before in the
    replay."""
    path = str(tmp_path / "record.jsonl")
    late = {"consult_gate": "after_reply", "consult_schedule_offset": 1}
    early = late | {"consult_gate": "before_dispatch"}
    first = train(tmp_path / "a", Calculator(), monkeypatch, expert_record=path, **late)
    again = train(tmp_path / "b", Calculator(), monkeypatch, expert_replay=path, **late)
    before = train(tmp_path / "c", Calculator(), monkeypatch, expert_replay=path, **early)
    assert same(first, again)
    assert same(first, before)
    assert before["asked"] == first["asked"] > 10


def test_a_resumed_recording_replays_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stale lines of the part that was lost stay in the file; the later ones count."""
    path = tmp_path / "record.jsonl"
    saving = {"expert_record": str(path), "save_strategy": "steps", "save_steps": 1}
    first = train(tmp_path / "a", Calculator(), monkeypatch, **saving)
    with path.open("a") as file:
        file.write('{"kind": "consult", "torn')
    whole = path.read_bytes()
    second = train(tmp_path / "b", Calculator(), monkeypatch, **saving)
    assert path.read_bytes().startswith(whole[: whole.rfind(b"\n") + 1])
    assert same(first, second)
    again = train(tmp_path / "c", Calculator(), monkeypatch, expert_replay=str(path))
    assert same(first, again)


def test_a_replay_repeats_what_was_given_away_under_pressure(tmp_path: Path) -> None:
    """In a pool that is too small, waits and prefill speed decide which KV is computed again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    model = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    words = build_dataset("train", 8, 0, steps=(4, 6))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in words]

    async def slow(request: ConsultRequest) -> str:
        await asyncio.sleep(random.SystemRandom().uniform(0.001, 0.03))
        return Calculator().reply(request.query).text or "unreadable"

    def collect(expert: Expert, **settings: Any) -> tuple[list[Any], dict[str, int]]:
        sampler = Sampler(model, tokenizer, SamplerConfig(num_blocks=64, block_size=8))
        policy = ConsultPolicy(timeout=20.0, dedup="off", max_reply_tokens=16, **settings)
        with ConsultScheduler(expert, policy) as desk:
            rollouts = collect_rollouts(
                sampler,
                prompts,
                SamplingParams(max_tokens=60, n=4, seed=3),
                protocol=ConsultProtocol(max_turns=4),
                scheduler=desk,
            )
        seen = [(r.token_ids.tolist(), r.logprobs.tobytes(), r.injections) for r in rollouts]
        return seen, sampler.drain_counters()

    path = tmp_path / "record.jsonl"
    first, counters = collect(Function(slow), record=path)
    assert counters["preemptions"] > 0
    for _ in range(2):
        again, same_counters = collect(Recorded(path))
        assert again == first
        assert same_counters == counters
