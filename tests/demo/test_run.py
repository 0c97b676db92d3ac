"""A smoke run of the demo and of its comparison, a few steps each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eapo_fast.demo.compare import Curve, read_curve, write
from eapo_fast.demo.run import run_demo
from eapo_fast.reporting import read_jsonl


def test_two_steps_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "demo"
    summary = run_demo(steps=2, output_dir=run, eval_size=24)
    rows = read_jsonl(run / "metrics.jsonl")
    assert rows[0]["step"] == 0
    assert rows[0]["eval_solo_n"] == 24
    assert rows[1]["expert/consult_rate"] > 0.3
    assert rows[1]["expert/accepted_share"] > 0.9
    assert summary["consults"]["accepted"] > 0
    assert summary == json.loads((run / "summary.json").read_text())
    for name in ("curves.png", "report.html"):
        assert (run / name).stat().st_size > 1000
    AutoModelForCausalLM.from_pretrained(run / "final")
    printed = capsys.readouterr().out
    assert "solo accuracy" in printed
    assert "bought" in printed
    assert str(run) in printed


def test_without_the_expert_nobody_consults(tmp_path: Path) -> None:
    run = tmp_path / "alone"
    summary = run_demo(steps=1, output_dir=run, eval_size=8, expert=False, quiet=True)
    assert summary["consults"]["asked"] == 0
    rows = read_jsonl(run / "metrics.jsonl")
    assert all("expert/asked" not in row for row in rows)
    assert len(read_curve(run).steps) == 2


def test_comparison_reads_equal_steps_and_equal_time(tmp_path: Path) -> None:
    helped = Curve([0, 10, 20], [0.0, 10.0, 20.0], [0.1, 0.3, 0.5])
    alone = Curve([0, 10, 20], [0.0, 5.0, 10.0], [0.1, 0.15, 0.2])
    assert helped.at_step(15) == 0.3
    assert helped.at_time(9.9) == 0.1
    assert alone.at_time(10.0) == 0.2
    page = write({"eapo": [helped, helped], "alone": [alone, alone]}, [0, 1], tmp_path, {})
    text = page.read_text()
    assert "| 20 | 50.0 (50.0-50.0) | 20.0 (20.0-20.0) |" in text
    assert "| 10 | 30.0 (30.0-30.0) | 20.0 (20.0-20.0) |" in text
    assert (tmp_path / "compare.png").stat().st_size > 1000
