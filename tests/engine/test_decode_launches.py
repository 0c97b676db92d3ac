"""A decode step waits for no GPU, and takes as few launches as the docs say."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

OWN = ["activate", "attend", "norm", "norm", "rotate_write"]
"""Triton's launches of a layer beside those for shared prefixes and split keys."""


@pytest.fixture
def decode_launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that counts."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("decode_launches")


@pytest.mark.parametrize(
    ("rows", "shared", "more"),
    [(256, True, ["attend_shared", "merge"]), (1024, False, []), (2, False, ["merge"])],
)
def test_launches_of_a_layer(
    rows: int, shared: bool, more: list[str], decode_launches: Any
) -> None:
    """Seven products; nothing else is torch's. Whoever waits for a number raises on "meta"."""
    one, two = (
        decode_launches.count(rows, layers=layers, fused=True, shared=shared) for layers in (1, 2)
    )
    expected = Counter({"addmm": 3, "mm": 4}) + Counter(f"{name} (Triton)" for name in OWN + more)
    assert two - one == expected
    assert (one - expected).total() == 15


def test_what_fusing_spares(decode_launches: Any) -> None:
    one, two = (decode_launches.count(256, layers=layers, fused=False) for layers in (1, 2))
    assert (two - one).total() == 41


def test_the_count_sees_what_waits_and_what_travels(decode_launches: Any) -> None:
    x = torch.empty(3, device="meta")
    with decode_launches.Launches() as ops:
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(RuntimeError, match="between the host and the device"):
            torch.zeros(3).to("meta")
        ops.counts.clear()
        torch.relu(x.view(1, 3).transpose(0, 1)).add_(x[0])
    assert ops.counts == {"relu": 1, "add_": 1}
