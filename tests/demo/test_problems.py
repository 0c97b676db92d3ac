from __future__ import annotations

import re

import pytest

from eapo_fast.demo.chains import LETTERS, Step, load_chains, parse_steps
from eapo_fast.demo.problems import MAX_VALUE, STEPS, Problem, build_dataset
from eapo_fast.errors import DataError


def read(problem: Problem) -> tuple[Step, ...]:
    lines = problem["prompt"].removesuffix("?").split(";")
    assert [line[:2] for line in lines] == [f"{letter}=" for letter in LETTERS[: len(lines)]]
    return parse_steps([line[2:] for line in lines])


def figures(problem: Problem) -> tuple[str, ...]:
    return tuple(step.expression for step in read(problem))


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_consistent(split: str) -> None:
    for row in build_dataset(split, 150, 7):
        steps = read(row)
        assert str(steps[-1].result) == row["answer"]
        assert len(steps) == row["steps"]
        assert STEPS[0] <= row["steps"] <= STEPS[1]
        assert all(1 <= value <= MAX_VALUE for s in steps for value in (s.left, s.right, s.result))
        assert re.fullmatch(rf"gsm8k-{split}-\d+(-r\d+)?", row["id"])


def test_held_apart_problems_are_at_least_200_real_chains() -> None:
    rows = build_dataset("test", None, 0)
    assert len(rows) >= 200
    assert len({row["prompt"] for row in rows}) >= 200
    assert {figures(row) for row in rows} <= {chain.figures for chain in load_chains("test")}


def test_no_train_problem_is_held_apart() -> None:
    held_apart = {chain.figures for chain in load_chains("test")}
    assert not held_apart & {figures(row) for row in build_dataset("train", 3000, 11)}


def test_a_problem_depends_on_seed_and_index_alone() -> None:
    rows = build_dataset("train", 40, 5)
    assert rows == build_dataset("train", 40, 5)
    assert rows[:17] == build_dataset("train", 17, 5)
    assert rows != build_dataset("train", 40, 6)
    assert build_dataset("test", 50, 5) == build_dataset("test", 50, 5)
    assert build_dataset("test", 50, 5) != build_dataset("test", 50, 6)


@pytest.mark.parametrize(
    ("split", "size", "steps", "word"),
    [
        ("test", 9999, STEPS, "held-apart"),
        ("test", 0, STEPS, "size"),
        ("train", None, STEPS, "size"),
        ("train", 5, (30, 40), "steps"),
        ("dev", 5, STEPS, "split"),
    ],
)
def test_bad_requests_are_named(
    split: str, size: int | None, steps: tuple[int, int], word: str
) -> None:
    with pytest.raises(DataError, match=word):
        build_dataset(split, size, 0, steps=steps)  # type: ignore[arg-type]
