"""Prompts that are attended once for a group: the same numbers, with or without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Step, assert_close
from check_paged_attention import attend


def spans(split: int) -> dict[str, dict[str, Any]]:
    """Steps with common prefixes of 16-token blocks, by how they meet the splits of keys."""
    return {
        "one_split": {
            "segments": [(1, split - 10), (1, split - 15), (1, split + 30), (1, 5)],
            "spans": [(0, 3, split - 16)],
        },
        "many_splits": {
            "segments": [(1, 20), *[(1, 2 * split + 84 + 7 * i) for i in range(7)], (1, 30)],
            "spans": [(1, 7, 2 * split + 80)],
        },
        "two_spans_in_any_order": {
            "segments": [*[(1, split + 20 + i) for i in range(5)], (4, 50), *[(1, 140)] * 3],
            "spans": [(6, 3, 128), (0, 5, split)],
        },
        "some_too_short_to_pay": {
            "segments": [(1, 30), (1, 20), (1, split + 90), (1, split + 91)],
            "spans": [(0, 2, 16), (2, 2, split + 80)],
        },
        "whole_split": {"segments": [(1, split + 1)] * 6, "spans": [(0, 6, split)]},
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"options": {"window": 60}, "dtype": torch.bfloat16},
    "all": {"options": {"window": 150, "softcap": 5.0}, "sinks": True},
}


@pytest.fixture(autouse=True)
def pays_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from eapo_fast.kernels.paged_attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "SHARED_PAYS", 40)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", spans(512))
def test_matches_float64(
    case: str, options: str, split: int, backend: str, device: torch.device
) -> None:
    step = Step(**spans(split)[case], **OPTIONS[options], q_heads=3, kv_heads=1)
    arguments = step.arguments(device)
    got = attend(arguments, backend)
    assert_close(got, arguments)
    alone = attend(arguments, backend, shared=None)
    if device.type == "cuda":
        assert torch.equal(got, alone)
    else:  # numpy's products round by the number of rows
        exact = got.dtype == torch.float32
        torch.testing.assert_close(got, alone, rtol=1e-5 if exact else 0.02, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(dtype: torch.dtype, split: int, backend: str, device: torch.device) -> None:
    step = Step(**spans(split)["many_splits"], dtype=dtype, q_heads=14, kv_heads=2, dim=64)
    arguments = step.arguments(device)
    assert_close(attend(arguments, backend), arguments)


def test_every_launch_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, split: int, backend: str, device: torch.device
) -> None:
    """Splits spread over programs or done by one: the folds are the same."""
    from eapo_fast.kernels.paged_attention import triton_kernel

    segments = [
        (1, 2 * split + 76),
        (7, split + 90),
        (1, 5),
        *[(1, 2 * split + 6 + i) for i in (0, 3)],
    ]
    step = Step(segments=segments, spans=[(3, 2, 2 * split)], dtype=torch.bfloat16, sinks=True)
    arguments = step.arguments(device)
    outputs = []
    for programs in (10**9, 0):
        monkeypatch.setattr(triton_kernel, "_PROGRAMS", programs)
        outputs += [attend(arguments, backend), attend(arguments, backend, longest=(7, 9 * split))]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
