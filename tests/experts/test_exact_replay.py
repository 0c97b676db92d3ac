"""A recorded training run over HTTP, with an expert of varying delay, replays to the bit."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eapo_fast import EAPOConfig, Trainer
from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.experts import Calculator, Expert, OpenAICompatible, ReplayMismatch
from eapo_fast.experts.lines import unsealed
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.training.generation import Generation

STEPS = 3


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
        "per_device_train_batch_size": 32,
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
    assert first["asked"] > 30
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
    with pytest.raises(ReplayMismatch, match="Replay|replay"):
        train(tmp_path / "seed", Calculator(), monkeypatch, expert_replay=str(path), seed=5)


def test_every_line_of_a_recording_is_sealed_and_tells_its_ticks(
    recorded: tuple[Path, Any],
) -> None:
    path, first = recorded
    lines = [unsealed(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "begin"] == [1, 2, 3]
    joined = [line["tick"] for line in lines for _ in line.get("inject", ())]
    assert joined
    assert set(joined) <= set(first["ticks"])
    waits = sum(len(line.get("waits", ())) for line in lines)
    assert waits == len(joined)
    assert sum(line["kind"] == "consult" for line in lines) == first["asked"]
