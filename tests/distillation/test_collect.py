"""Solutions asked of an expert: the right ones are kept, nothing is asked twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from eapo_fast.cli import main
from eapo_fast.demo import POLICY
from eapo_fast.distillation import collect_solutions, load_solutions
from eapo_fast.errors import DataError
from eapo_fast.experts import ConsultRequest, Function
from eapo_fast.reporting import read_jsonl

ROWS = [{"problem": f"{a}+{a}?", "answer": str(2 * a)} for a in range(1, 9)]


class Solver:
    """Doubles; wrong on multiples of 3, raises on 4, and stops working after `limit` calls."""

    def __init__(self, limit: int = 10**9) -> None:
        self.asked: list[str] = []
        self.limit = limit

    def __call__(self, request: ConsultRequest) -> str:
        if len(self.asked) >= self.limit:
            raise KeyboardInterrupt
        self.asked.append(request.query)
        a = int(request.query.split("+")[0])
        if a == 4:
            raise ValueError("no idea")
        return f"Twice {a} is \\boxed{{{2 * a + (a % 3 == 0)}}}."


def expert(solver: Solver) -> Function:
    return Function(solver, identity="solver", immediate=True)


def test_right_solutions_are_kept_and_read_back(tmp_path: Path) -> None:
    solver, told = Solver(), []
    path = collect_solutions(ROWS, expert(solver), tmp_path, progress=told.append)
    solved = [row["problem"] for row in read_jsonl(path)]
    assert solved == [f"{a}+{a}?" for a in (1, 2, 5, 7, 8)]
    assert told == ["solutions: 5 correct, 2 incorrect, 1 malformed"]
    assert next(s.text for s in load_solutions(path)) == "Twice 1 is \\boxed{2}."
    assert collect_solutions(ROWS, expert(solver), tmp_path) == path
    assert len(solver.asked) == 8
    other = collect_solutions(ROWS[:2], expert(solver), tmp_path)
    assert other != path
    assert len(read_jsonl(other)) == 2
    assert len(solver.asked) == 8, "known replies are not asked for again"


def test_an_interrupted_collection_asks_for_the_rest_only(tmp_path: Path) -> None:
    stopped, going_on = Solver(limit=5), Solver()
    with pytest.raises(KeyboardInterrupt):
        collect_solutions(ROWS, expert(stopped), tmp_path)
    assert not list(tmp_path.glob("solutions-*"))
    collect_solutions(ROWS, expert(going_on), tmp_path)
    kept = {q for q in stopped.asked if q != "4+4?"}
    assert kept.isdisjoint(going_on.asked)
    assert kept | set(going_on.asked) == {row["problem"] for row in ROWS}


def test_nothing_right_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no solution of the expert is right \(1 incorrect\)"):
        collect_solutions([ROWS[2]], expert(Solver()), tmp_path)
    with pytest.raises(DataError, match="choosing solutions needs"):
        collect_solutions([{"problem": "1+1?"}], expert(Solver()), tmp_path)


def test_the_command_asks_a_local_expert_and_trains(tmp_path: Path) -> None:
    """The embedded policy as its own expert: no gain, but the whole way."""
    from eapo_fast.demo.problems import build_dataset
    from eapo_fast.evaluation.folder import write_lines

    write_lines(tmp_path / "train.jsonl", build_dataset("test", 24, 0, steps=(2, 2)))
    words = [
        "distill", "--model", str(POLICY), "--data", str(tmp_path / "train.jsonl"), "--cpu",
        "--out", str(tmp_path / "out"), "--expert", "local", "--expert-model", str(POLICY),
        "--max-steps", "1",
    ]  # fmt: skip
    assert main(words) == 0
    assert (tmp_path / "out" / "final" / "config.json").is_file()
    assert len(list((tmp_path / "out").glob("solutions-*.jsonl"))) == 1
