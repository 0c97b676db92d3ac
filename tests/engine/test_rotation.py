"""Rotary embeddings that are left to attention: when, and what happens if it never gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.engine.rotation import RotationHabit, Rotations
from eapo_fast.errors import ModelError

Q, K = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
ANGLES = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q + 1, k + 1


def ask(rotations: Rotations, habit: RotationHabit, q: Tensor = Q, **options: Any) -> Any:
    return rotations.ask(q, K, ANGLES, habit, turn, **{"widens": False, **options})


def taught() -> RotationHabit:
    habit, rotations = RotationHabit(), Rotations()
    assert not habit.hands_on
    q, k = ask(rotations, habit)
    assert rotations.take(None, q, k) is None
    assert habit.hands_on
    return habit


def test_who_hands_them_on_gets_them_back_unturned() -> None:
    habit, rotations = taught(), Rotations()
    q, k = ask(rotations, habit)
    assert q is Q
    assert k is K
    angles = rotations.take(None, q, k)
    assert angles is not None
    assert [x.shape for x in angles] == [(3, 4), (3, 4)]
    assert rotations.take(None, q, k) is None
    rotations.finish()


def test_what_attention_could_not_do_alike_is_done_at_once() -> None:
    for options, kind in (({"q": Q.repeat(2, 1, 1, 1)}, None), ({"widens": True}, None),
                          ({}, torch.bfloat16)):  # fmt: skip
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
            q, _ = ask(Rotations(), taught(), **options)
        assert torch.equal(q, options.get("q", Q) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = Q.bfloat16()
        assert ask(Rotations(), taught(), q=half, widens=True)[0] is half


ENDS: dict[str, Callable[[Rotations, RotationHabit], Any]] = {
    "attention with others": lambda rotations, _: rotations.take(object(), Q + 0, K),
    "the next rotation": ask,
    "the end of the forward": lambda rotations, _: rotations.finish(),
}


@pytest.mark.parametrize("end", ENDS)
def test_other_tensors_or_none_are_an_error(end: str) -> None:
    habit, rotations = taught(), Rotations()
    ask(rotations, habit)
    with pytest.raises(ModelError, match="used to attend with what its rotary embedding returns"):
        ENDS[end](rotations, habit)
    assert not habit.hands_on


def test_who_once_did_otherwise_is_not_trusted_again() -> None:
    habit, rotations = RotationHabit(), Rotations()
    ask(rotations, habit)
    q, k = ask(rotations, habit)  # twice for one attention
    rotations.take(None, q, k)
    assert not habit.hands_on
    q, k = ask(rotations, habit)
    assert torch.equal(q, Q + 1)
    rotations.take(None, q, k)
    assert not habit.hands_on
