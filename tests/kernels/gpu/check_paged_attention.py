"""Paged attention on a GPU backend against float64, and what its bits may depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Step, assert_close
from torch import Tensor

from eapo_fast.kernels.paged_attention import paged_attention

MIXED = ((1, 1), (1, 63), (17, 17), (5, 40), (1, 0), (1, 100), (20, 133), (1, 16), (3, 0))
SHAPES: dict[str, dict[str, int]] = {
    "grouped": {"q_heads": 14, "kv_heads": 2, "dim": 64},
    "odd_dim": {"q_heads": 6, "kv_heads": 3, "dim": 24, "block_size": 5},
    "many_heads": {"q_heads": 20, "kv_heads": 1, "dim": 16, "block_size": 1},
    "no_groups": {"q_heads": 2, "kv_heads": 2, "dim": 128, "block_size": 32},
    "wide": {"q_heads": 4, "kv_heads": 2, "dim": 72},
    "widest": {"q_heads": 3, "kv_heads": 1, "dim": 256, "block_size": 64},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"options": {"softcap": 2.0}},
    "window": {"options": {"window": 7}},
    "sinks": {"sinks": True},
    "all": {"options": {"window": 90, "softcap": 5.0}, "sinks": True},
}


def attend(arguments: dict[str, Any], backend: str, **changes: Any) -> Tensor:
    copies = {
        name: arguments[name].clone() if name.endswith("_cache") else arguments[name]
        for name in arguments
    }
    return paged_attention(**{**copies, **changes}, backend=backend)


def long(split: int) -> list[tuple[int, int]]:
    """Segments around the borders of splits of keys."""
    return [(1, split + 1), (2, split), (1, 2 * split + 9), (20, 3 * split - 7), (1, split), (1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: str, dtype: str, backend: str, device: torch.device) -> None:
    step = Step(segments=MIXED, dtype=DTYPES[dtype], **SHAPES[shape])  # type: ignore[arg-type]
    arguments = step.arguments(device)
    assert_close(attend(arguments, backend), arguments)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, split: int, backend: str, device: torch.device) -> None:
    for segments in (MIXED, long(split)):
        arguments = Step(segments=segments, seed=1, **OPTIONS[options]).arguments(device)
        assert_close(attend(arguments, backend), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(dtype: str, split: int, backend: str, device: torch.device) -> None:
    arguments = Step(segments=long(split), dtype=DTYPES[dtype], seed=2).arguments(device)
    assert_close(attend(arguments, backend), arguments)


def test_window_across_splits(split: int, backend: str, device: torch.device) -> None:
    for window in (split, split + 1, split + 90):
        step = Step(segments=long(split), options={"window": window}, seed=window)
        arguments = step.arguments(device)
        assert_close(attend(arguments, backend), arguments)


def test_writes_the_cache_and_nothing_else(backend: str, device: torch.device) -> None:
    arguments = Step(segments=MIXED, dtype=torch.bfloat16).arguments(device)
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    paged_attention(**arguments, backend=backend)
    live = arguments["slots"] >= 0
    for name, new in (("k_cache", "k"), ("v_cache", "v")):
        before[name].flatten(0, 1)[arguments["slots"][live]] = arguments[new][live]
        assert torch.equal(before[name].view(torch.int16), arguments[name].view(torch.int16))


def test_bits_depend_on_a_row_s_keys_alone(split: int, backend: str, device: torch.device) -> None:
    segments = ((1, 2 * split + 5), (1, 3), (9, split + 40), (1, split))
    step = Step(segments=segments, dtype=torch.bfloat16)
    arguments = step.arguments(device)
    want = attend(arguments, backend)
    for s, (q_len, _) in enumerate(segments):
        begin = int(arguments["cu_q"][s])
        rows = slice(begin, begin + q_len)
        alone = {name: arguments[name][rows] for name in ("q", "k", "v", "slots")}
        alone |= {name: arguments[name][s : s + 1] for name in ("kv_lens", "block_tables")}
        cu_q = torch.tensor([0, q_len], dtype=torch.int32, device=device)
        assert torch.equal(attend({**arguments, **alone, "cu_q": cu_q}, backend), want[rows])


def test_bits_do_not_depend_on_blocks_or_bounds(
    split: int, backend: str, device: torch.device
) -> None:
    segments = ((1, split + 80), (5, split + 10), (1, 17))
    outputs = []
    for block_size in (16, 1, 48):
        arguments = Step(segments=segments, block_size=16, dtype=torch.bfloat16).arguments(device)
        outputs.append(attend(_with_blocks(arguments, block_size), backend))
    arguments = Step(segments=segments, block_size=16, dtype=torch.bfloat16).arguments(device)
    outputs += [
        attend(arguments, backend, longest=bounds) for bounds in ((5, split + 80), (64, 8 * split))
    ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def _with_blocks(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    """The same step over blocks of another size."""
    old = arguments["k_cache"].shape[1]
    tables, lens = arguments["block_tables"], arguments["kv_lens"].tolist()
    width = -(-max(lens) // size)
    caches = [
        torch.full(
            (len(lens) * width, size, *arguments[name].shape[2:]), torch.nan, device=tables.device
        ).to(arguments[name].dtype)
        for name in ("k_cache", "v_cache")
    ]
    new_tables = torch.arange(len(lens) * width, dtype=torch.int32, device=tables.device)
    slots = []
    cu_q = arguments["cu_q"].tolist()
    for s, length in enumerate(lens):
        at = torch.arange(length, device=tables.device)
        source = tables[s][at // old].long() * old + at % old
        target = s * width * size + at
        for cache, name in zip(caches, ("k_cache", "v_cache"), strict=True):
            cache.flatten(0, 1)[target] = arguments[name].flatten(0, 1)[source]
        slots.append(target[length - (cu_q[s + 1] - cu_q[s]) :])
    changed = {"k_cache": caches[0], "v_cache": caches[1], "slots": torch.cat(slots)}
    return {**arguments, **changed, "block_tables": new_tables.view(len(lens), width)}


def test_strided_inputs_and_no_rows(backend: str, device: torch.device) -> None:
    arguments = Step(segments=MIXED).arguments(device)
    want = attend(arguments, backend)
    packed = torch.cat([arguments[name] for name in ("q", "k", "v")], dim=1)
    q, k, v = packed.split([2, 1, 1], dim=1)
    assert torch.equal(attend(arguments, backend, q=q, k=k, v=v), want)
    turned = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attend(arguments, backend, q=turned), want)
    names = ("q", "k", "v", "slots", "kv_lens", "block_tables")
    empty = {name: arguments[name][:0] for name in names} | {"cu_q": arguments["cu_q"][:1]}
    assert attend({**arguments, **empty}, backend).shape == (0, 2, 16)
