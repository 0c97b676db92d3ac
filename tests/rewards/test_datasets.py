"""Gold solutions of public data sets against their own answers and against each other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.rewards import readable, verify

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train_200.jsonl"])
def test_every_gsm8k_solution_is_correct(name: str) -> None:
    wrong = [
        row["id"]
        for row in rows(name)
        if not verify(f"{row['solution']}\n#### {row['answer']}", row["answer"]).correct
    ]
    assert wrong == []


def test_every_math500_solution_is_correct() -> None:
    wrong = [
        row["id"]
        for row in rows("math500.jsonl")
        if not verify(row["solution"], row["answer"]).correct
    ]
    assert wrong == []


def test_every_gold_is_readable() -> None:
    assert [r["answer"] for r in rows("math500.jsonl") if readable(r["answer"])] == []


@pytest.mark.parametrize("shift", [1, 7, 113])
def test_shifted_pairs_are_incorrect(shift: int) -> None:
    data = rows("math500.jsonl")
    accepted, undecided = [], 0
    for index, row in enumerate(data):
        other = data[(index + shift) % len(data)]
        if row["answer"] == other["answer"]:
            continue
        verdict = verify(row["solution"], other["answer"])
        undecided += verdict.status == "undecided"
        if verdict.correct:
            accepted.append((verdict.prediction, verdict.gold))
    assert accepted in ([], [("5", "x=5")])
    assert undecided <= 2
