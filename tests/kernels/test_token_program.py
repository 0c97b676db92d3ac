"""The C++ token program is the one that its Python source makes."""

from __future__ import annotations

from pathlib import Path

from eapo_fast.kernels.policy_loss import generate

MADE = Path(__file__).parents[2] / "csrc" / "cpu" / "token_program-inl.h"


def test_the_committed_program_is_up_to_date() -> None:
    assert MADE.read_text() == generate.generate(generate.SOURCE.read_text())


def test_a_changed_source_makes_another_program() -> None:
    source = generate.SOURCE.read_text()
    changed = source.replace("push = -advantage", "push = advantage * 2.0")
    assert "push = (advantage * 2.0f);" in generate.generate(changed)
