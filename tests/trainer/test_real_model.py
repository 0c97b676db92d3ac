"""A user's own model: a directory, a JSONL of problems, a chat-completions expert on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eapo_fast import EAPOConfig, Trainer
from eapo_fast.cli import main
from eapo_fast.experts import OpenAICompatible
from eapo_fast.reporting import read_jsonl

CHAT_SERVER = Path(__file__).parents[1] / "experts" / "chat_server.py"


@pytest.fixture(scope="session")
def chat_server_module() -> Any:
    import sys
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("chat_server", CHAT_SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["chat_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(chat_server_module: Any) -> Iterator[Any]:
    with chat_server_module.ChatServer(
        answer=lambda body: "<think>hm</think>Halve it: \\boxed{24} </advice>"
    ) as running:
        yield running


@pytest.fixture(params=["qwen2", "qwen3"])
def model_dir(
    request: pytest.FixtureRequest,
    make_model: Callable[..., Any],
    bpe_tokenizer: Any,
    tmp_path: Path,
) -> Path:
    """A saved tiny model whose policy likes to write consult blocks."""
    model = make_model(request.param)
    folder = tmp_path / request.param
    _teach(model, bpe_tokenizer)
    model.save_pretrained(folder)
    bpe_tokenizer.save_pretrained(folder)
    return folder


def _teach(model: Any, tokenizer: Any) -> None:
    """Overfit one consulting answer, so that a random model really consults."""
    import torch

    question = "<|user|>Half of {}?<|assistant|>Half of it? <consult><q>48/2</q></consult>"
    texts = [question.format(2 * n) for n in range(1, 9)]
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(160):
        ids = torch.tensor([rows[step % len(rows)]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def problems(folder: Path, count: int = 8) -> Path:
    path = folder / "problems.jsonl"
    rows = [{"problem": f"Half of {2 * n}?", "answer": str(n)} for n in range(1, count + 1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run_file(folder: Path, model_dir: Path, data: Path, url: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "model": str(model_dir),
        "train_dataset": str(data),
        "reward_funcs": ["accuracy"],
        "consult_prompt": "",
        "expert": {"kind": "openai", "base_url": url, "model": "any"},
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": 60,
        "logging_steps": 1,
        "save_rollouts_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def test_train_from_yaml_with_an_http_expert(
    model_dir: Path, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    path = run_file(tmp_path, model_dir, problems(tmp_path), server.url)
    assert main(["train", str(path)]) == 0
    assert "report.html" in capsys.readouterr().out
    run = tmp_path / "run"
    assert read_jsonl(run / "metrics.jsonl")[-1]["step"] == 2
    lines = [line for s in (1, 2) for line in read_jsonl(run / "rollouts" / f"step_{s:06d}.jsonl")]
    consults = [c for line in lines for c in line["consults"]]
    assert {c["status"] for c in consults} >= {"ok"}
    assert all("<think>" not in c["text"] for c in consults)
    for line in lines:
        for segment in line["segments"]:
            if segment["kind"] == "expert":
                assert segment["text"].count("</advice>") == 1
    AutoModelForCausalLM.from_pretrained(run / "final")


def test_expert_that_refuses_connection_is_a_warning(
    make_model: Callable[..., Any],
    bpe_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model()
    _teach(model, bpe_tokenizer)
    expert = OpenAICompatible("http://127.0.0.1:9/v1", "any")
    args = EAPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, num_generations=4, use_cpu=True,
        max_completion_length=60, save_strategy="no", logging_steps=1, expert_timeout=2.0,
        consult_prompt="",
    )  # fmt: skip
    trainer = Trainer(
        model, "accuracy", args, str(problems(tmp_path)), None, bpe_tokenizer, expert=expert
    )
    trainer.train()
    assert "127.0.0.1:9" in capsys.readouterr().out
    row = trainer.state.log_history[0]
    assert row["expert/down"] > 0
    assert row["expert/accepted"] == 0


def test_gsm8k_rows_train(
    make_model: Callable[..., Any], bpe_tokenizer: Any, shared_data: Path, tmp_path: Path
) -> None:
    args = EAPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, num_generations=4, use_cpu=True,
        max_completion_length=16, save_strategy="no", max_prompt_length=400,
    )  # fmt: skip
    data = str(shared_data / "gsm8k_train_200.jsonl")
    trainer = Trainer(make_model(), "accuracy", args, data, None, bpe_tokenizer)
    assert len(trainer.train_rows or ()) > 100
    trainer.train()
    assert trainer.state.global_step == 1


def test_dry_run_prints_the_plan_and_trains_nothing(
    make_model: Callable[..., Any],
    bpe_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    bpe_tokenizer.save_pretrained(folder)
    path = run_file(tmp_path, folder, problems(tmp_path), "http://127.0.0.1:9/v1")
    assert main(["train", str(path), "--dry-run", "--learning_rate", "1e-5"]) == 0
    assert "learning_rate: 1.0e-05" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unknown_key_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, tmp_path, problems(tmp_path), "http://127.0.0.1:9/v1", max_step=3)
    assert main(["train", str(path)]) == 2
    assert "Did you mean 'max_steps'" in capsys.readouterr().err


def test_eval_command(
    make_model: Callable[..., Any],
    bpe_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    bpe_tokenizer.save_pretrained(folder)
    data = problems(tmp_path)
    common = [
        "eval",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--max-tokens",
        "8",
        "--limit",
        "3",
    ]
    assert main(common) == 0
    assert "mean@32" in capsys.readouterr().out
    assert main([*common, "--assisted", "--expert", "calculator", "--n", "2"]) == 0
    assert "mean@2" in capsys.readouterr().out
