"""Fused CPU pieces of a transformer layer against transformers' own, in one run.

    pytest benchmarks/bench_layers.py [--benchmark-json=FILE]

Values first. Shapes: a decode step of 256 rows of the model of bench_sampler.py. `extra_info`
holds the time of the unfused ops and the ratio. Both sides count their quickest round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from eapo_fast.kernels.gated_activation import gated_activation
from eapo_fast.kernels.rms_norm import rms_norm
from eapo_fast.kernels.rotary import rotary

ROWS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 256, 256, 1024, 8, 2
Work = Callable[[], Any]


def norm(dtype: torch.dtype) -> tuple[Work, Work]:
    """Return the fused and the unfused RMS norm."""
    module, x = Qwen2RMSNorm(HIDDEN).to(dtype), torch.randn(1, ROWS, HIDDEN).to(dtype)
    return lambda: rms_norm(x, module.weight, 1e-6), lambda: module(x)


def gate(dtype: torch.dtype) -> tuple[Work, Work]:
    """Return the fused and the unfused middle of a gated MLP."""
    a, b = (torch.randn(1, ROWS, INTERMEDIATE).to(dtype) for _ in range(2))
    return lambda: gated_activation(a, b), lambda: silu(a) * b


def rotate(dtype: torch.dtype) -> tuple[Work, Work]:
    """Return the fused and the unfused rotary embedding of queries and keys."""
    width = HIDDEN // HEADS
    q = torch.randn(1, ROWS, HEADS, width).to(dtype).transpose(1, 2)
    k = torch.randn(1, ROWS, KV_HEADS, width).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(1, ROWS, width).to(dtype) for _ in range(2))
    return lambda: rotary(q, k, cos, sin), lambda: apply_rotary_pos_emb(q, k, cos, sin)


def quickest(work: Work, rounds: int) -> float:
    """Return the seconds of the quickest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", [norm, gate, rotate], ids=lambda f: f.__name__)
def bench_layers(
    benchmark: Any, build: Callable[[torch.dtype], tuple[Work, Work]], dtype: torch.dtype
) -> None:
    """One call for all rows."""
    torch.manual_seed(0)
    ours, theirs = build(dtype)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        got, want = ours(), theirs()
        for a, b in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)
        benchmark.pedantic(ours, rounds=100, warmup_rounds=10)
        torch_s = quickest(theirs, 100)
    ratio = torch_s / benchmark.stats.stats.min
    benchmark.extra_info.update(
        torch_us=round(torch_s * 1e6), ratio=round(ratio, 2), threads=torch.get_num_threads()
    )
