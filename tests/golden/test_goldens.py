"""The published values of every method that has an adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import adapters
import pytest

_HERE = Path(__file__).parent / "base_recipes.json"
_SHARED = Path(__file__).resolve().parents[3] / "shared" / "methods"
_FILES = ("golden_entropy_and_clipping.json", "golden_credit_and_guidance.json")


def _cases(file: Path) -> list[Any]:
    if not file.is_file():
        reason = pytest.mark.skip(reason=f"no published values at {file}")
        return [pytest.param({}, id=file.name, marks=reason)]
    known = set(adapters.methods())
    return [
        pytest.param(case, id=f"{case['method']} {case.get('case', number)}")
        for number, case in enumerate(json.loads(file.read_text()))
        if case["method"] in known
    ]


def _agrees(got: Any, want: Any, tolerance: float) -> bool:
    if isinstance(want, list):
        alike = isinstance(got, list) and len(got) == len(want)
        return alike and all(_agrees(g, w, tolerance) for g, w in zip(got, want, strict=True))
    if want is None or isinstance(want, bool):
        return got is want
    real = isinstance(got, (int, float)) and not isinstance(got, bool)
    return real and math.isclose(got, want, rel_tol=tolerance, abs_tol=tolerance)


def _check(case: dict[str, Any]) -> None:
    got = adapters.evaluate(case["method"], case.get("case"), case["inputs"])
    expected = {name: want for name, want in case["expected"].items() if name != "note"}
    assert set(got) == set(expected)
    for name, want in expected.items():
        assert _agrees(got[name], want, case["tolerance"]), (name, got[name], want)


@pytest.mark.parametrize("case", _cases(_HERE))
def test_base_recipes(case: dict[str, Any]) -> None:
    _check(case)


@pytest.mark.parametrize("case", [c for name in _FILES for c in _cases(_SHARED / name)])
def test_published_methods(case: dict[str, Any]) -> None:
    _check(case)


def test_every_base_case_has_an_adapter() -> None:
    known = {case["method"] for case in json.loads(_HERE.read_text())}
    assert known <= set(adapters.methods())


@pytest.mark.skipif(not _SHARED.is_dir(), reason=f"no published values at {_SHARED}")
def test_base_cases_are_the_published_ones() -> None:
    published = json.loads((_SHARED / _FILES[0]).read_text())
    known = set(adapters.methods())
    here = json.loads(_HERE.read_text())
    assert here == [case for case in published if case["method"] in known]


def test_a_method_without_adapter_is_named() -> None:
    with pytest.raises(KeyError, match="no_such_method"):
        adapters.evaluate("no_such_method", None, {})
