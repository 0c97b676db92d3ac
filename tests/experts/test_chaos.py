"""Faults of a real HTTP server, one kind after another and all together.

`EAPO_FAST_CHAOS=1000 pytest tests/experts/test_chaos.py` asks 1000 consults of each kind instead of
50 (in waves of 50: about nine minutes).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eapo_fast import EAPOConfig, Trainer
from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.experts import (
    STATUSES,
    Budget,
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    OpenAICompatible,
    Pool,
)
from eapo_fast.experts.secret import Secret
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.training.generation import Generation

KEY = "sk+chaos/KEY=0123456789"
CONSULTS = int(os.environ.get("EAPO_FAST_CHAOS", "50"))
WAVE = 50
CAP = 200_000

# What a consult may end as if it always meets the fault, and if it meets it once.
ENDS: dict[str, tuple[set[str], set[str]]] = {
    "hang": ({"timeout"}, {"timeout"}),
    "reset": ({"down", "timeout"}, {"ok", "down"}),
    "slow_drip": ({"timeout"}, {"timeout"}),
    "cut_body": ({"down", "timeout"}, {"ok", "down"}),
    "wrong_length": ({"malformed", "down", "timeout"}, {"ok", "malformed", "down"}),
    "rate_with_retry_after": ({"rate", "timeout"}, {"ok", "rate", "timeout"}),
    "rate_without": ({"rate", "timeout"}, {"ok", "rate", "timeout"}),
    "server_error": ({"down", "timeout"}, {"ok", "down"}),
    "unauthorized": ({"refused"}, {"refused"}),
    "invalid_json": ({"malformed"}, {"ok", "malformed"}),
    "wrong_schema": ({"malformed"}, {"ok", "malformed"}),
    "empty": ({"malformed"}, {"ok", "malformed"}),
    "huge": ({"too_long", "timeout"}, {"too_long", "timeout"}),
    "not_utf8": ({"malformed"}, {"ok", "malformed"}),
    "duplicate": ({"ok"}, {"ok"}),
    "late_after_cancel": ({"timeout"}, {"timeout"}),
    "clock_jump": ({"rate", "timeout"}, {"ok", "rate", "timeout"}),
}


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    """The module tests/experts/chaos_server.py."""
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(__file__).with_name("chaos_server.py")
    spec = spec_from_file_location("chaos_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """For the clock_jump kind the wall clock leaps by days at every look."""
    if request.node.callspec.params["kind"] != "clock_jump":
        return
    real, looks = time.time, iter(range(1_000_000_000))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(looks) * 3e6)


def test_every_kind_is_covered(chaos: ModuleType) -> None:
    assert set(ENDS) == set(chaos.KINDS)
    assert len(chaos.KINDS) >= 16


@pytest.mark.usefixtures("jumping_clock")
@pytest.mark.parametrize("kind", list(ENDS))
def test_a_fault_is_an_outcome(
    chaos: ModuleType,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CHAOS_KEY", KEY)
    results: list[ConsultResult] = []
    slowest: list[float] = []
    sockets, threads = chaos.sockets_of_this_process(), threading.active_count()
    files = {"record": tmp_path / "record.jsonl", "cache": tmp_path / "cache.sqlite"}
    policy = ConsultPolicy(**chaos.settings(), **files)
    with caplog.at_level(logging.DEBUG), chaos.ChaosServer(kind) as server:
        expert = OpenAICompatible(server.url, "m", api_key_env="CHAOS_KEY", prices=(1.0, 2.0))
        budget = [Budget(consults=20 * CONSULTS), Budget(tokens=CAP * CONSULTS)]
        desk = ConsultScheduler(expert, policy, budget)
        asked = 0
        for wave in range(0, CONSULTS, WAVE):
            for _ in range(3):  # a pause of the machine may stretch a wave: then once more
                handles = [desk.submit(_ask(n)) for n in range(wave, min(wave + WAVE, CONSULTS))]
                ended = [handle.result(30.0) for handle in handles]
                asked += len(ended)
                latest = max(result.latency for result in ended)
                in_time = latest <= policy.timeout + 0.25
                if in_time and all(result.accepted for result in ended[1::2]):
                    break
            slowest.append(latest)
            results += ended
        metrics = desk.drain_metrics()
        desk.close()
        state, ledger = json.dumps(desk.state_dict()), desk.ledger
        seen = [state, json.dumps(metrics), repr(results), repr(handles), repr(vars(desk))]
    _check_statuses(kind, results, once_only=asked == WAVE)
    assert sum(metrics[f"expert/{status}"] for status in STATUSES) == asked
    assert metrics["expert/asked"] == asked
    assert max(slowest) <= policy.timeout + 0.25
    assert all(not any(account.reserved) for account in ledger._accounts.values())
    assert ledger.overruns == 0
    assert ledger.total().consults <= metrics["expert/sent"]
    assert server.requests <= metrics["expert/sent"]
    gc.collect()
    assert _settles(lambda: chaos.sockets_of_this_process() <= sockets)
    assert _settles(lambda: threading.active_count() <= threads)
    _check_secret([caplog.text, *seen], tmp_path)


def _ask(number: int) -> ConsultRequest:
    return ConsultRequest(f"hint {number}", "a problem", rollout=number)


def _check_statuses(kind: str, results: list[ConsultResult], *, once_only: bool) -> None:
    always, once = ENDS[kind]
    for number, result in enumerate(results):
        allowed = {"ok"} if number % 2 else always if number % 4 == 0 else once
        status = "ok" if result.status == "cached" else result.status
        assert status in allowed, (number, result)
        assert result.text == (f"hint {number}" if status == "ok" else "")
    if "ok" in once and once_only:
        recovered = sum(r.status == "ok" for n, r in enumerate(results) if n % 4 == 2)
        assert recovered > 0


def _settles(holds: Any) -> bool:
    end = time.monotonic() + 3.0
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds())


def _check_secret(texts: list[str], folder: Path) -> None:
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    files.append(Path("/proc/self/cmdline").read_bytes())
    for form in Secret(KEY).forms():
        assert not any(form in text for text in texts)
        assert not any(form.encode() in data for data in files)


def test_a_step_of_training_survives_all_faults_at_once(
    chaos: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """0 exceptions, 0 rollouts lost, statuses add up; the key is in no file of the run."""
    monkeypatch.setenv("CHAOS_KEY", KEY)
    generations: list[Generation] = []
    whole = Generation.kept

    def kept(generation: Generation) -> list[int]:
        generations.append(generation)
        return whole(generation)

    monkeypatch.setattr(Generation, "kept", kept)
    args = EAPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=32,
        num_generations=8,
        consult_prompt="",
        max_completion_length=70,
        max_turns=4,
        consult_schedule="constant",
        expert_timeout=0.5,
        expert_record=str(tmp_path / "record.jsonl"),
        expert_cache=str(tmp_path / "cache.sqlite"),
        logging_steps=1,
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    with caplog.at_level(logging.DEBUG), chaos.ChaosServer() as server:
        good = OpenAICompatible(server.url, "m", api_key_env="CHAOS_KEY")
        gone = OpenAICompatible("http://127.0.0.1:9/v1", "m", api_key_env="CHAOS_KEY")
        trainer = Trainer(
            str(POLICY),
            ["exact"],
            args,
            build_dataset("train", 16, 0, steps=(4, 6)),
            expert=Pool({"good": good, "gone": gone}),
            protocol=ConsultProtocol(),
        )
        trainer.train()
    assert len(generations) == 2
    for generation in generations:
        assert len(generation.rollouts) == 32
        assert all(r.finish_reason in ("stop", "length", "turns") for r in generation.rollouts)
        assert all(len(r.requests) == len(r.consults) for r in generation.rollouts)
    ended = [c.status for g in generations for r in g.rollouts for c in r.consults]
    logs = trainer.state.log_history
    assert len(ended) == sum(row["expert/asked"] for row in logs) > 30
    for status in STATUSES:
        assert ended.count(status) == sum(row[f"expert/{status}"] for row in logs)
    assert len(set(ended)) >= 3
    _check_secret([caplog.text, repr(logs)], tmp_path)
