"""The distillation baseline: what is learnt from, the loss, resuming, and that it helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eapo_fast.demo import POLICY
from eapo_fast.demo.chains import keyed_generator, load_chains
from eapo_fast.demo.problems import build_dataset, problem_of
from eapo_fast.demo.teacher import Habits, Teacher
from eapo_fast.distillation import DistillSettings, distill, load_solutions
from eapo_fast.distillation.run import _Run
from eapo_fast.errors import ConfigError, DataError
from eapo_fast.evaluation import EvalSettings, evaluate_model
from eapo_fast.reporting import read_jsonl

WORDS = [
    "Half of 48 is 24.",
    "48 + 24 = 72, so 72.",
    "Clips: 48/2 = 24",
    "She sold 72 clips in May.",
]
ROWS = [
    {"problem": f"How many clips, {i}?", "solution": f"{word} \\boxed{{{i}}}", "answer": str(i)}
    for i, word in enumerate(WORDS * 2)
]


def settings(**changes: Any) -> DistillSettings:
    base: dict[str, Any] = {
        "batch_size": 3, "max_steps": 6, "save_steps": 2, "learning_rate": 3e-3,
    }  # fmt: skip
    return DistillSettings(**(base | changes))


@pytest.fixture
def run(make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Distill a fresh tiny model into a folder."""

    def build(folder: str, data: Any = ROWS, **options: Any) -> dict[str, Any]:
        changes = options.pop("settings", {})
        return distill(
            options.pop("model", None) or make_model(),
            data,
            tmp_path / folder,
            settings(**changes),
            processing_class=bpe_tokenizer,
            use_cpu=True,
            **options,
        )

    return build


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "cohere"])
@pytest.mark.parametrize("tokens", [64, 4096], ids=["many rows", "one row"])
def test_the_gradient_is_that_of_cross_entropy_over_solution_tokens(
    make_model: Callable[..., Any], bpe_tokenizer: Any, kind: str, tokens: int
) -> None:
    """Against transformers' own logits with torch's cross-entropy, prompts masked by -100."""
    model = make_model(kind, spread=0.2)
    chosen = settings(micro_batch_tokens=tokens)
    ours = _Run(model, ROWS[:4], chosen, bpe_tokenizer, use_cpu=True)
    model.zero_grad()
    loss, count = ours._backward(ours.rollouts)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for rollout in ours.rollouts:
        prompt, solution = rollout.prompt_ids, rollout.token_ids.tolist()
        ids = torch.tensor([[*prompt, *solution]])
        labels = torch.tensor([-100] * len(prompt) + solution)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.double(), labels[1:], ignore_index=-100, reduction="sum"
        )
    (total / count).backward()
    assert count == sum(len(r.token_ids) for r in ours.rollouts)
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            error = float((found[name] - parameter.grad).abs().max())
            assert error <= 2e-4 * scale + 1e-7, name


def test_solutions_are_learnt(run: Callable[..., Any]) -> None:
    summary = run("out", settings={"max_steps": 100, "batch_size": 8, "learning_rate": 1e-2})
    assert summary["loss_last"] < 0.5 * summary["loss_first"]


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: int | None,
) -> None:
    from transformers import AutoModelForCausalLM

    if lora:
        pytest.importorskip("peft")
    whole = run("whole", settings={"lora": lora})
    step = _Run._step

    def failing(self: _Run, number: int) -> dict[str, float]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run("cut", settings={"lora": lora})
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    told: list[str] = []
    cut = run("cut", settings={"lora": lora}, progress=told.append)
    assert told[0] == "continuing after step 2 of 6"
    lines = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final") for name in ("whole", "cut")
    ]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    same = ("steps", "solutions", "tokens", "loss_first", "loss_last", "trained")
    assert {k: whole[k] for k in same} == {k: cut[k] for k in same}


def test_a_death_before_the_summary_costs_nothing(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("whole")

    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    for method in ("_save_final", "_summary"):
        with monkeypatch.context() as patch:
            patch.setattr(_Run, method, dying)
            with pytest.raises(KeyboardInterrupt):
                run("cut")
    told: list[str] = []
    assert run("cut", progress=told.append)["loss_last"] == first["loss_last"]
    assert told == ["continuing after step 6 of 6"]
    same = [(tmp_path / f / "final" / "model.safetensors").read_bytes() for f in ("whole", "cut")]
    assert same[0] == same[1]


def test_a_finished_run_is_not_repeated_and_another_is_refused(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    first = run("out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert run("out") == first
    with pytest.raises(ConfigError, match=r"another distillation: learning_rate was 0.003 and is"):
        run("out", settings={"learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="data changed"):
        run("out", ROWS[:5])
    run("out", ROWS[:5], restart=True)
    assert (tmp_path / "out" / "old" / "final").is_dir()


def test_an_adapter_leaves_the_base_and_its_folder_evaluates(
    run: Callable[..., Any], make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    bpe_tokenizer.save_pretrained(tmp_path / "base")
    run("out", model=str(tmp_path / "base"), settings={"lora": 4})
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    chosen = EvalSettings(n=2, max_tokens=12, temperature=1.0, limit=2)
    results = []
    for name in ("final", "adapter"):
        evaluate_model(str(out / name), ROWS, tmp_path / f"eval-{name}", chosen, use_cpu=True)
        lines = read_jsonl(tmp_path / f"eval-{name}" / "problems.jsonl")
        results.append([line["texts"] for line in lines])
    assert results[0] == results[1]
    again = run("again", model=str(out / "adapter"), settings={"max_steps": 1})
    assert again["trained"] == "all weights"


def test_only_consistent_solutions_are_kept(tmp_path: Path) -> None:
    rows = [
        {"question": "6*7?", "answer": "6*7=42\n#### 42"},
        {"problem": "1+1?", "solution": "It is 2.", "answer": "2"},
        {"problem": "1+2?", "solution": "\\boxed{4}", "answer": "3"},
        {"prompt": "Say hi.", "solution": "hi"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"1 of 4 solutions end in another answer.*\n  row 2"):
        kept = load_solutions(path)
    assert [s.text for s in kept] == ["6*7=42\n#### 42", "It is 2.\n\\boxed{2}", "hi"]
    with pytest.raises(DataError, match=r"1 of 2 rows have no solution \(rows \[1\]"):
        load_solutions([rows[0], {"problem": "x?", "answer": "1"}])


def test_long_solutions_are_left_out(run: Callable[..., Any]) -> None:
    long = {"problem": "Long?", "solution": "1+1+" * 60 + "1", "answer": "61"}
    with pytest.warns(UserWarning, match="1 of 9 solutions are longer than max_length 80"):
        assert run("out", [*ROWS, long], settings={"max_length": 80})["solutions"] == 8
    with pytest.raises(DataError, match="max_length 5: the shortest"):
        run("none", settings={"max_length": 5})


def test_control_tokens_in_a_solution_are_plain_text(
    make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    rows = [{"problem": "Hi?", "solution": "one <|end|> two"}]
    built = _Run(make_model(), rows, settings(), bpe_tokenizer, use_cpu=True)
    ids = built.rollouts[0].token_ids
    assert np.flatnonzero(ids == bpe_tokenizer.eos_token_id).tolist() == [len(ids) - 1]


def test_settings_out_of_range_are_refused_before_the_first_step(run: Callable[..., Any]) -> None:
    for name in ("epochs", "learning_rate"):
        with pytest.raises(ConfigError, match=f"{name}: got inf, allowed is a finite number"):
            settings(**{name: float("inf")})
    with pytest.raises(ConfigError, match="lora: got rank 100000, allowed is at most"):
        run("wide", settings={"lora": 100_000})


def test_the_correct_samples_of_an_experts_evaluation_are_solutions(tmp_path: Path) -> None:
    chosen = EvalSettings(n=6, max_tokens=60, temperature=1.0, top_p=1.0)
    rows = build_dataset("test", 6, 0, steps=(2, 2))
    evaluate_model(str(POLICY), rows, tmp_path / "expert", chosen)
    solutions = load_solutions(tmp_path / "expert")
    lines = read_jsonl(tmp_path / "expert" / "problems.jsonl")
    texts = {t for r in lines for t, c in zip(r["texts"], r["correct"], strict=True) if c}
    assert {s.text for s in solutions} == texts != set()
    assert len(solutions) == len({(s.row["prompt"], s.text) for s in solutions})
    with pytest.raises(ConfigError, match=r"holds no evaluation.json"):
        load_solutions(tmp_path)


def test_distillation_from_exact_solutions_helps_the_embedded_policy(tmp_path: Path) -> None:
    """Forty steps on the exact teacher's text; the problems of the test are held apart."""
    chains = [c for c in load_chains("train") if len(c.steps) in (2, 3) and max(c.values) <= 150]
    rows = []
    for index, chain in enumerate(chains[:200]):
        pieces = Teacher(chain, Habits(), keyed_generator(0, index)).write()
        rows.append({**problem_of(chain), "solution": "".join(p.text for p in pieces)})
    summary = distill(
        str(POLICY), rows, tmp_path / "student",
        DistillSettings(max_steps=40, batch_size=16, learning_rate=3e-4),
    )  # fmt: skip
    test = build_dataset("test", 40, 0, steps=(2, 3))
    chosen = EvalSettings(n=4, max_tokens=60, temperature=1.0, top_p=1.0)
    before, after = (
        evaluate_model(model, test, tmp_path / f"eval-{name}", chosen)["results"]["mean_at_n"]
        for name, model in (("before", str(POLICY)), ("after", summary["final"]))
    )
    assert after["low"] > before["high"]
