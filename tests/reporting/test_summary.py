from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from eapo_fast.reporting.metrics import read_jsonl
from eapo_fast.reporting.summary import print_summary, summarise, summary_lines


def test_last_lines_say_it_plainly(make_run):
    summary = json.loads((make_run() / "summary.json").read_text())
    lines = dict(summary_lines(summary | {"run_dir": "runs/[demo]"}))
    assert lines == {
        "solo accuracy": "4.0 % [2.0, 7.7] -> 34.0 % [27.8, 40.8], +30.0 points  "
        "(95 % intervals, 200 held-apart problems)",
        "consults": "312 bought, 1,240 saved by early gating, of 1,552 asked; 312 accepted",
        "wall time": "3:39 for 40 steps: setup 0:04, rollout 1:58, reward 0:02, update 1:11, "
        "evaluation 0:22, other 0:01",
        "results": "runs/[demo]/",
    }


def test_results_name_what_is_there(make_run):
    run = make_run()
    lines = dict(summary_lines({"run_dir": str(run)}))
    assert lines == {"results": f"{run}/  (metrics.jsonl, rollouts/)"}


def test_summary_prints_one_line_each_without_codes_in_a_pipe(make_run):
    out = io.StringIO()
    summary = {"run_dir": "runs/[demo]", "seconds": {"total": 61}}
    print_summary(summary, console=Console(file=out, width=20, soft_wrap=True))
    assert out.getvalue() == "\nwall time      1:01\nresults        runs/[demo]/\n"


def test_summary_from_metrics_alone(make_run):
    rows = read_jsonl(make_run(summary=False) / "metrics.jsonl")
    summary = summarise(rows, seed=3)
    consults = summary["consults"]
    assert summary["solo_before"]["accuracy"] == pytest.approx(0.04)
    assert summary["solo_after"]["accuracy"] == pytest.approx(0.34)
    assert consults["asked"] == consults["sent"] + consults["saved_by_gate"]
    assert consults["by_status"] == {
        "ok": consults["accepted"],
        "declined": consults["saved_by_gate"],
    }
    assert summary["seconds"]["total"] == pytest.approx(40 * 1.3)
    assert (summary["steps"], summary["seed"]) == (40, 3)


def test_sums_weigh_a_row_by_the_steps_it_averages():
    rows = [{"step": 10, "expert/asked": 2.0}, {"step": 20, "expert/asked": 1.5}]
    assert summarise(rows)["consults"]["asked"] == 35


def test_reporting_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import eapo_fast.reporting as r; print(r.wilson(1, 2)[0] > 0, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
