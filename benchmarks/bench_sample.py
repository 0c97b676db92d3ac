"""The fused CPU sampler against torch's softmax and multinomial, in one run.

    pytest benchmarks/bench_sample.py [--benchmark-json=FILE]

Values first: tokens and log-probabilities must be those of the float64 reference. Ours returns the
log-probability as well; torch's side is the bare draw. `extra_info` holds torch's time and the
ratio; without truncation it must reach 40 in float32. Both sides count their quickest round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels.sample import Draws, sample

SHAPES = [(256, 4096), (32, 151_936)]
LEAST_RATIO = 40
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bans": {"temperature": 0.7, "bans": 4},
    "top_p": {"temperature": 0.7, "top_p": 0.95},
    "top_k": {"temperature": 0.7, "top_k": 50},
    "min_p": {"temperature": 0.7, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


def ours(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    bans: int = 0,
) -> Callable[..., Draws]:
    """Return the draw of one token a row; `bans` entries of every row are banned."""
    rows = logits.shape[0]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, logits.shape[1], (rows * bans,), generator=generator, dtype=torch.int32)
    settings = {
        "rows": torch.arange(rows, dtype=torch.int32),
        "uniforms": torch.rand(rows, generator=generator),
        "temperatures": torch.full((rows,), temperature),
        "top_ps": torch.full((rows,), top_p),
        "top_ks": torch.full((rows,), top_k, dtype=torch.int32),
        "min_ps": torch.full((rows,), min_p),
        "banned": (torch.arange(rows, dtype=torch.int32).repeat_interleave(bans), ids),
    }
    return lambda x=logits, backend="auto": sample(x, **settings, backend=backend)  # type: ignore[arg-type]


def theirs(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    bans: int = 0,
) -> Callable[[], Tensor]:
    """Return torch's draw for the same settings; top-p by sorting, bans by one indexed write."""

    def draw() -> Tensor:
        scores = logits.float()
        if temperature == 0:
            return scores.argmax(-1)
        if temperature != 1:
            scores = scores / temperature
        if bans:
            scores[:, :bans] = -torch.inf
        if top_k:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
        if min_p:
            floor = scores.amax(-1, keepdim=True) + torch.tensor(min_p).log()
            scores = scores.masked_fill(scores < floor, -torch.inf)
        if top_p < 1:
            scores, order = scores.sort(-1, descending=True)
            probabilities = scores.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities > top_p
            drawn = probabilities.masked_fill(beyond, 0.0).multinomial(1)
            return order.gather(1, drawn)
        return scores.softmax(-1).multinomial(1)

    return draw


def quickest(work: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of the quickest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def check(draw: Callable[..., Draws], logits: Tensor) -> None:
    """Assert that the draws are the float64 reference's, but for borders that rounding moves."""
    got, want = draw(), draw(logits.double(), "reference")
    same = (got.tokens == want.tokens) & ((got.kept_mass - want.kept_mass).abs() < 1e-5)
    assert same.double().mean() > 0.95
    torch.testing.assert_close(got.logprobs[same].double(), want.logprobs[same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES, ids=["256x4096", "32x151936"])
def bench_sample(benchmark: Any, rows: int, vocab: int, case: str, dtype: torch.dtype) -> None:
    """One draw a row from normal logits."""
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    draw, settings = ours(logits, **CASES[case]), CASES[case]
    check(draw, logits)
    benchmark.pedantic(draw, rounds=30, warmup_rounds=3)
    torch_s = quickest(theirs(logits, **settings), 4)
    ratio = torch_s / benchmark.stats.stats.min
    benchmark.extra_info.update(
        torch_ms=round(torch_s * 1e3, 2), ratio=round(ratio, 1), threads=torch.get_num_threads()
    )
    if case == "plain" and dtype == torch.float32:
        assert ratio >= LEAST_RATIO
