"""Paged attention against dense attention in float64, and its promises about determinism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.paged_attention import copy_blocks, paged_attention


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every instruction set of this CPU."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads and block size of a case."""

    q_heads: int = 8
    kv_heads: int = 2
    dim: int = 32
    block_size: int = 16


@dataclass(kw_only=True)
class Case:
    """Sequences with their whole q, k, v, of which the last `q_lens` tokens are this step's."""

    shape: Shape
    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def random(
        cls, shape: Shape, segments: Sequence[tuple[int, int]], dtype: torch.dtype, seed: int = 0
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def tensors(heads: int) -> list[Tensor]:
            return [
                torch.randn(kv, heads, shape.dim, generator=generator).to(dtype)
                for _, kv in segments
            ]

        return cls(
            shape=shape,
            q_lens=[q for q, _ in segments],
            kv_lens=[kv for _, kv in segments],
            q=tensors(shape.q_heads),
            k=tensors(shape.kv_heads),
            v=tensors(shape.kv_heads),
        )

    def step(self, block_size: int | None = None) -> dict[str, Tensor]:
        """Arguments of the op; unwritten cache entries are NaN."""
        size = block_size or self.shape.block_size
        widths = [-(-kv // size) for kv in self.kv_lens]
        blocks = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(1))
        tables = torch.full((len(widths), max(widths, default=1) + 1), -1, dtype=torch.int32)
        dtype = self.q[0].dtype
        cache = (sum(widths) + 3, size, self.shape.kv_heads, self.shape.dim)
        caches = [torch.full(cache, torch.nan, dtype=dtype) for _ in range(2)]
        slots, used = [], 0
        for s, (width, q_len, kv) in enumerate(zip(widths, self.q_lens, self.kv_lens, strict=True)):
            tables[s, :width] = blocks[used : used + width]
            used += width
            slot = (tables[s, :width].long().unsqueeze(1) * size + torch.arange(size)).flatten()
            old = kv - q_len
            for target, source in zip(caches, (self.k[s], self.v[s]), strict=True):
                target.flatten(0, 1)[slot[:old]] = source[:old]
            slots.append(slot[old:kv])

        def new(parts: list[Tensor]) -> Tensor:
            return torch.cat([p[len(p) - q :] for p, q in zip(parts, self.q_lens, strict=True)])

        return {
            "q": new(self.q),
            "k": new(self.k),
            "v": new(self.v),
            "k_cache": caches[0],
            "v_cache": caches[1],
            "slots": torch.cat(slots),
            "cu_q": torch.tensor([0, *self.q_lens]).cumsum(0).int(),
            "kv_lens": torch.tensor(self.kv_lens, dtype=torch.int32),
            "block_tables": tables,
        }

    def dense(self, *, softcap: float = 0.0, window: int = 0) -> Tensor:
        """Float64 attention of the new rows, one sequence and one head at a time."""
        outputs = []
        for q_len, q, k, v in zip(self.q_lens, self.q, self.k, self.v, strict=True):
            group = self.shape.q_heads // self.shape.kv_heads
            keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * self.shape.dim**-0.5
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
            if window:
                seen &= ~torch.ones(len(q), len(q), dtype=torch.bool).tril(-window)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values)[len(q) - q_len :])
        return torch.cat(outputs)


MIXED = ((1, 1), (1, 63), (17, 17), (5, 40), (1, 100), (33, 133), (1, 16))
SHAPES = {
    "grouped": Shape(),
    "odd_dim": Shape(q_heads=6, kv_heads=3, dim=20, block_size=5),
    "one_kv_head": Shape(q_heads=7, kv_heads=1, dim=64, block_size=8),
    "many_heads": Shape(q_heads=40, kv_heads=1, dim=16, block_size=1),
    "no_groups": Shape(q_heads=3, kv_heads=3, dim=128, block_size=32),
    "wide": Shape(q_heads=4, kv_heads=2, dim=72, block_size=16),
}


def attend(
    case: Case, *, block_size: int | None = None, backend: str = "cpu", **options: float
) -> Tensor:
    return paged_attention(
        **case.step(block_size),
        scale=case.shape.dim**-0.5,
        softcap=options.get("softcap", 0.0),
        window=int(options.get("window", 0)),
        backend=backend,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_dense_float64(isa: str, shape: str) -> None:
    case = Case.random(SHAPES[shape], MIXED, torch.float32)
    torch.testing.assert_close(attend(case).double(), case.dense(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(isa: str, shape: str) -> None:
    case = Case.random(SHAPES[shape], MIXED, torch.bfloat16)
    got = attend(case)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), case.dense(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"window": 7}, {"window": 40, "softcap": 5.0}]
)
def test_softcap_and_window(isa: str, options: dict[str, float]) -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    want = case.dense(softcap=options.get("softcap", 0.0), window=int(options.get("window", 0)))
    torch.testing.assert_close(attend(case, **options).double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 9])
def test_reference_in_float64(shape: str, window: int) -> None:
    case = Case.random(SHAPES[shape], MIXED, torch.float64)
    got = attend(case, backend="auto", window=window)
    torch.testing.assert_close(got, case.dense(window=window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_new_keys_and_values_reach_the_cache(isa: str, dtype: torch.dtype) -> None:
    case = Case.random(Shape(dim=20), MIXED, dtype)
    step = case.step()
    paged_attention(**step, scale=1.0, backend="cpu")
    for cache, new in (("k_cache", "k"), ("v_cache", "v")):
        assert torch.equal(step[cache].flatten(0, 1)[step["slots"]], step[new])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_threads_blocks_or_batch(isa: str, dtype: torch.dtype) -> None:
    case = Case.random(Shape(q_heads=6), MIXED, dtype)
    want = attend(case)
    threads = _core.num_threads()
    try:
        for count in (1, 2, 3):
            _core.set_num_threads(count)
            assert torch.equal(attend(case), want)
    finally:
        _core.set_num_threads(threads)
    assert torch.equal(attend(case, block_size=3), want)
    start = 0
    for s, q_len in enumerate(case.q_lens):
        alone = Case(
            shape=case.shape,
            q_lens=[q_len],
            kv_lens=[case.kv_lens[s]],
            q=[case.q[s]],
            k=[case.k[s]],
            v=[case.v[s]],
        )
        assert torch.equal(attend(alone), want[start : start + q_len])
        start += q_len


@pytest.mark.parametrize("window", [0, 11])
def test_bits_do_not_depend_on_chunking(isa: str, window: int) -> None:
    whole = Case.random(Shape(q_heads=6), [(77, 77)], torch.float32)
    want = attend(whole, window=window)
    for begin, end in ((0, 1), (0, 40), (40, 77), (76, 77), (31, 50)):
        chunk = Case(
            shape=whole.shape,
            q_lens=[end - begin],
            kv_lens=[end],
            q=[whole.q[0][:end]],
            k=[whole.k[0][:end]],
            v=[whole.v[0][:end]],
        )
        assert torch.equal(attend(chunk, window=window), want[begin:end])


def test_sliced_inputs_and_no_rows(isa: str) -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    step, want = case.step(), attend(case)
    packed = torch.cat([step["q"], step["k"], step["v"]], dim=1)
    step["q"], step["k"], step["v"] = packed.split([8, 2, 2], dim=1)
    got = paged_attention(**step, scale=case.shape.dim**-0.5, backend="cpu")
    assert torch.equal(got, want)
    empty = {name: step[name][:0] for name in ("q", "k", "v", "slots", "kv_lens", "block_tables")}
    rest = {"cu_q": torch.zeros(1, dtype=torch.int32), "k_cache": step["k_cache"]}
    out = paged_attention(**empty, **rest, v_cache=step["v_cache"], scale=1.0, backend="cpu")
    assert out.shape == (0, 8, 32)


def test_runs_under_inference_mode(isa: str) -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    with torch.inference_mode():
        got = attend(case)
    assert torch.equal(got, attend(case))


def test_bad_arguments_are_named() -> None:
    case = Case.random(Shape(), MIXED, torch.float32)

    def rejects(error: type[Exception], message: str, **change: Tensor) -> None:
        with pytest.raises(error, match=message):
            paged_attention(**{**case.step(), **change}, scale=1.0, backend="cpu")  # type: ignore[arg-type]

    step = case.step()
    rejects(TypeError, "k: want float32 like q, got bfloat16", k=step["k"].bfloat16())
    rejects(
        ValueError, r"v: want shape \[59, 2, 32\], got shape \[59, 2, 31\]", v=step["v"][..., 1:]
    )
    rejects(TypeError, "slots: want int64, got int32", slots=step["slots"].int())
    rejects(ValueError, r"slots\[0\] is -1, but there are", slots=step["slots"] * 0 - 1)
    rejects(ValueError, "cu_q must run from 0 to 59", cu_q=step["cu_q"] + 1)
    rejects(ValueError, "has 1 query rows .* and 0 keys", kv_lens=step["kv_lens"] * 0)
    rejects(ValueError, "but the cache has", block_tables=step["block_tables"] + 1000)
    rejects(
        ValueError,
        "segment 1 needs 4 blocks for 63 keys",
        block_tables=step["block_tables"][:, :2].contiguous(),
    )
    rejects(TypeError, "kv_lens: want a torch.Tensor, got list", kv_lens=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_copy_blocks(backend: str, dtype: torch.dtype) -> None:
    cache = torch.arange(7 * 3 * 2 * 5).view(7, 3, 2, 5).to(dtype)
    want = cache.clone()
    want[[5, 1, 2]] = cache[[0, 0, 6]]
    want[0] = cache[3]
    pairs = torch.tensor([[0, 5], [0, 1], [6, 2], [3, 0]], dtype=torch.int32)
    copy_blocks(cache, pairs, backend=backend)
    assert torch.equal(cache, want)
    copy_blocks(cache, pairs[:0], backend=backend)
    assert torch.equal(cache, want)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 1], [2, 1]], "target block 1 is the target of an earlier pair"),
        ([[0, 1], [1, 2]], "source block 1 is the target of an earlier pair"),
        ([[0, 4]], "is 4, but there are 4 blocks"),
    ],
    ids=["target_twice", "chained", "out_of_range"],
)
def test_copy_blocks_rejects(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_blocks(torch.zeros(4, 2), torch.tensor(pairs, dtype=torch.int32))
