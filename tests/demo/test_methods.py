"""The paper's comparison rows, on the demo, in small."""

from __future__ import annotations

import json
from pathlib import Path

from eapo_fast.demo.chains import load_chains
from eapo_fast.demo.methods import main, solutions
from eapo_fast.demo.problems import problem_of
from eapo_fast.rewards import verify


def test_five_rows_are_made_and_measured_once(tmp_path: Path) -> None:
    words = ["--steps", "1", "--n", "2", "--limit", "4"]
    words += ["--out", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    assert main(words) == 0
    rows = json.loads((tmp_path / "report" / "table.json").read_text())
    assert [row["title"] for row in rows] == [
        "Base model", "Expert-assisted workflow", "Distillation", "Self-exploratory RL", "EAPO",
    ]  # fmt: skip
    asked = [row["consults"]["asked_per_sample"] for row in rows]
    assert asked[1] > 0.0
    assert asked[:1] + asked[2:] == [0.0] * 4
    files = sorted((tmp_path / "runs").rglob("*.safetensors"))
    before = [f.stat().st_mtime_ns for f in files]
    assert main(words) == 0
    assert [f.stat().st_mtime_ns for f in files] == before


def test_the_solutions_are_right_and_none_is_a_test_problem() -> None:
    rows = solutions(0)
    assert len(rows) > 1000
    assert all(verify(r["solution"], r["answer"]).correct for r in rows)
    test = {problem_of(chain)["prompt"] for chain in load_chains("test")}
    assert not test & {row["prompt"] for row in rows}
