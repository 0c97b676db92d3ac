"""`Trainer.evaluate()` and `evaluate_model` measure the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.demo.run import demo_config
from eapo_fast.evaluation import EvalSettings, evaluate_model
from eapo_fast.experts import Calculator
from eapo_fast.reporting.stats import wilson
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.trainer import Trainer

ROWS = build_dataset("test", 12, 0, steps=(2, 3))


def build(folder: Path, **changes: Any) -> Trainer:
    config = demo_config(output_dir=folder).replace(
        max_completion_length=60, use_cpu=True, disable_tqdm=True, **changes
    )
    return Trainer(
        str(POLICY), ["exact"], config, None, ROWS, expert=Calculator(), protocol=ConsultProtocol()
    )


@pytest.mark.parametrize("kind", ["solo", "assisted"])
def test_both_give_the_same_figures(tmp_path: Path, kind: str) -> None:
    trainer = build(tmp_path / "run", num_generations_eval=4)
    metrics = trainer.evaluate(assisted=kind == "assisted")
    chosen = EvalSettings(
        n=4, temperature=1.0, top_p=1.0, max_tokens=60, max_turns=4, consult_prompt="",
        seed=trainer.args.seed,
    )  # fmt: skip
    expert = Calculator() if kind == "assisted" else None
    results = evaluate_model(str(POLICY), ROWS, tmp_path / "eval", chosen, expert=expert)["results"]
    for ours, theirs in (
        ("accuracy", results["mean_at_n"]["value"]),
        ("accuracy_low", results["mean_at_n"]["low"]),
        ("accuracy_high", results["mean_at_n"]["high"]),
        ("any_at_n", results["any_at_n"]["value"]),
        ("maj_at_n", results["maj_at_n"]["value"]),
        ("var", results["var"]["value"]),
        ("consults", results["consults"]["asked_per_sample"]),
        ("completions/mean_length", results["tokens"]["mean"]),
        ("completions/clipped_ratio", results["truncated"]),
    ):
        assert metrics[f"eval_{kind}_{ours}"] == pytest.approx(theirs), ours
    assert 0.0 < metrics[f"eval_{kind}_accuracy"] < 1.0


def test_one_sample_keeps_wilsons_interval(tmp_path: Path) -> None:
    metrics = build(tmp_path / "run").evaluate()
    share = metrics["eval_solo_accuracy"]
    low, high = wilson(share * 12, 12)
    assert (metrics["eval_solo_accuracy_low"], metrics["eval_solo_accuracy_high"]) == (low, high)
    assert "eval_solo_any_at_n" not in metrics


def test_rewards_without_gold_answers_are_averaged(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    config = demo_config(output_dir=tmp_path / "run").replace(
        max_completion_length=20, num_generations_eval=2, use_cpu=True
    )

    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(c)) for c in completions]

    metrics = Trainer(str(POLICY), short, config, None, rows).evaluate()
    assert metrics["eval_solo_accuracy"] == pytest.approx(metrics["eval_solo_reward"])
    assert "eval_solo_any_at_n" not in metrics
    low, high = (metrics[f"eval_solo_accuracy_{end}"] for end in ("low", "high"))
    assert low < metrics["eval_solo_accuracy"] < high < 0.0
