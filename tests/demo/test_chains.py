from __future__ import annotations

import json
from fractions import Fraction
from importlib import resources
from pathlib import Path

import pytest

from eapo_fast.demo import extract_chains
from eapo_fast.demo.chains import (
    Chain,
    apply,
    is_sound,
    iter_rows,
    keyed_generator,
    load_chains,
    parse_steps,
    read_solution,
    resample,
)
from eapo_fast.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
SPLITS = ("train", "test")


def read(solution: str, answer: str) -> list[str] | None:
    chain = read_solution("x", solution, answer, max_value=999)
    return None if chain is None else [step.text for step in chain.steps]


@pytest.mark.parametrize(
    ("solution", "answer", "steps"),
    [
        ("<<48/2=24>>24 and <<48+24=72>>", "72", ["48/2", "48+a"]),
        ("<<16-3-4=9>> then <<9*2=18>>", "18", ["16-3", "a-4", "b*2"]),
        ("<<2+3*4=14>>", "14", ["3*4", "2+a"]),
        ("<<(2+3)*4=20>>", "20", ["2+3", "a*4"]),
        ("<<5*5=25>><<25-5=20>><<5*20=100>>", "100", ["5*5", "a-5", "5*b"]),
        ("<<7=7>><<7*3=21>>", "21", ["7*3"]),
    ],
)
def test_a_solution_becomes_linked_binary_steps(
    solution: str, answer: str, steps: list[str]
) -> None:
    assert read(solution, answer) == steps


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("<<48/2=23>>", "23"),
        ("<<5/2=2.5>><<2.5*2=5>>", "5"),
        ("<<10*.5=5>>", "5"),
        ("<<3-5=-2>>", "-2"),
        ("<<2*3=6>><<4+4=8>>", "8"),
        ("<<2*3=6>>", "7"),
        ("<<999+1=1000>>", "1000"),
        ("<<4/0=0>>", "0"),
        ("<<2*x=6>>", "6"),
        ("<<(2*3=6>>", "6"),
        ("no marks", "6"),
    ],
)
def test_what_is_not_a_chain_is_left_out(solution: str, answer: str) -> None:
    assert read(solution, answer) is None


@pytest.mark.parametrize("split", SPLITS)
def test_committed_chains_are_exact_and_linked(split: str) -> None:
    chains = load_chains(split)
    assert len(chains) > 100
    for chain in chains:
        assert is_sound(chain, max_value=9999)
        for step in chain.steps:
            assert apply(step.op, Fraction(step.left), Fraction(step.right)) == step.result


@pytest.mark.parametrize("split", SPLITS)
def test_committed_files_name_source_and_licence_and_hold_no_prose(split: str) -> None:
    text = resources.files("eapo_fast.demo").joinpath(f"chains_{split}.json").read_text("utf-8")
    header = json.loads(text)
    chains = header.pop("chains")
    assert "openai/grade-school-math" in header["source"]
    assert header["licence"].startswith("MIT")
    assert len(header["commit"]) >= 7
    assert all(set(row) == {"id", "steps", "results"} for row in chains)


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize("split", SPLITS)
def test_committed_chains_are_what_the_command_makes(split: str, tmp_path: Path) -> None:
    extract_chains.main(["--data", str(DATA), "--out", str(tmp_path)])
    committed = resources.files("eapo_fast.demo").joinpath(f"chains_{split}.json")
    assert (tmp_path / f"chains_{split}.json").read_text("utf-8") == committed.read_text("utf-8")


def test_resampling_keeps_operations_and_links_and_depends_on_its_key_alone() -> None:
    for index, chain in enumerate(load_chains("train")[:40]):
        new = resample(chain, keyed_generator(3, index), max_value=150)
        if new is None:
            continue
        assert new == resample(chain, keyed_generator(3, index), max_value=150)
        assert is_sound(new, max_value=150)
        assert [(s.op, s.refs) for s in new.steps] == [(s.op, s.refs) for s in chain.steps]


def test_json_round_trip_and_wrong_results() -> None:
    chain = load_chains("test")[0]
    row = chain.to_json()
    assert Chain.from_json(row) == chain
    with pytest.raises(DataError, match="do not follow"):
        Chain.from_json({**row, "results": [0] * len(row["results"])})


@pytest.mark.parametrize("text", ["a+1", "1+", "1+2+3", "1 + 2", "A+1"])
def test_bad_steps_are_named(text: str) -> None:
    with pytest.raises(DataError, match="step"):
        parse_steps([text])


def test_blank_lines_are_skipped() -> None:
    assert list(iter_rows(iter(['{"a": 1}', "", " "]))) == [{"a": 1}]


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(DataError, match="split"):
        load_chains("dev")  # type: ignore[arg-type]
