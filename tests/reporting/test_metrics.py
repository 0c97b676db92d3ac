from __future__ import annotations

import json
import math

import numpy as np
import pytest

from eapo_fast.errors import DataError
from eapo_fast.reporting.metrics import MetricsLog, read_jsonl, series


def test_every_line_is_readable_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"reward": 0.25, "note": "\u00e9"})
        assert read_jsonl(path) == [{"step": 1, "reward": 0.25, "note": "\u00e9"}]


def test_step_comes_first_and_scalars_of_arrays_are_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(3, {"reward": np.float32(0.5), "step": 99, "n": np.int64(7), "flag": True})
    assert path.read_text() == '{"step": 3, "reward": 0.5, "n": 7, "flag": true}\n'


def test_numbers_that_json_cannot_hold_become_null_with_a_note(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "reward": 1.0})
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["grad_norm"], row["kl"], row["reward"]) == (None, None, None, 1.0)
    assert row["not_finite"] == {"loss": "nan", "grad_norm": "inf", "kl": "-inf"}
    assert series(read_jsonl(path), "loss") == ([], [])


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 8, "rew', b"\x00\x00\x00", b"\xff\xfe{"], ids=repr
)
def test_resume_drops_later_steps_and_a_torn_tail(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            log.write(step, {"reward": step / 10})
    path.write_bytes(path.read_bytes() + tail)
    with MetricsLog(path, resume_step=5) as log:
        log.write(6, {"reward": 0.66})
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["reward"] == 0.66


def test_resume_without_a_file_starts_one(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=5) as log:
        log.write(6, {"reward": 1})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_a_new_run_keeps_the_earlier_log_aside(tmp_path):
    for reward in (0.1, 0.2):
        with MetricsLog(tmp_path / "metrics.jsonl") as log:
            log.write(1, {"reward": reward})
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["reward"] == 0.2
    assert read_jsonl(tmp_path / "metrics.jsonl.old")[0]["reward"] == 0.1


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "7"], ids=["torn", "list", "number"])
def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path)
