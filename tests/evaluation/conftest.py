"""The embedded policy and a few of its problems: a real model to evaluate end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.demo import POLICY
from eapo_fast.demo.problems import build_dataset
from eapo_fast.evaluation import EvalSettings


@pytest.fixture(scope="session")
def policy() -> str:
    return str(POLICY)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Ten held-apart problems of two steps, as a JSONL file."""
    rows = build_dataset("test", 10, 0, steps=(2, 3))
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quick() -> Callable[..., EvalSettings]:
    """Settings of an evaluation that takes a second."""

    def build(**changes: Any) -> EvalSettings:
        base: dict[str, Any] = {
            "n": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 60, "chunk": 3,
            "consult_prompt": "", "max_turns": 3,
        }  # fmt: skip
        return EvalSettings(**(base | changes))

    return build
