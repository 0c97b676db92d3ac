"""Paged attention against dense attention in float64, and its promises about determinism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class Span:
    """Segments that begin with the same tokens in the same blocks."""

    first: int
    count: int
    tokens: int


@dataclass(kw_only=True)
class Case:
    """Sequences with their whole q, k, v, of which the last `q_lens` tokens are this step's."""

    shape: Shape
    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    spans: Sequence[Span] = ()
    sinks: Tensor | None = None

    @classmethod
    def random(
        cls,
        shape: Shape,
        segments: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        *,
        spans: Sequence[Span] = (),
        sinks: bool = False,
    ) -> Case:
        generator = torch.Generator().manual_seed(0)

        def tensors(heads: int) -> list[Tensor]:
            return [
                torch.randn(kv, heads, shape.dim, generator=generator).to(dtype)
                for _, kv in segments
            ]

        case = cls(
            shape=shape,
            q_lens=[q for q, _ in segments],
            kv_lens=[kv for _, kv in segments],
            q=tensors(shape.q_heads),
            k=tensors(shape.kv_heads),
            v=tensors(shape.kv_heads),
            spans=spans,
            sinks=torch.randn(shape.q_heads, generator=generator).to(dtype) if sinks else None,
        )
        for span in spans:
            for parts in (case.k, case.v):
                for part in parts[span.first : span.first + span.count]:
                    part[: span.tokens] = parts[span.first][: span.tokens]
        return case

    def segment(self, index: int, begin: int, end: int) -> Case:
        """The rows [begin, end) of one sequence alone."""
        return replace(
            self,
            q_lens=[end - begin],
            kv_lens=[end],
            q=[self.q[index][:end]],
            k=[self.k[index][:end]],
            v=[self.v[index][:end]],
            spans=(),
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
            for span in self.spans:
                if span.first <= s < span.first + span.count:
                    same = span.tokens // size
                    tables[s, :same] = tables[span.first, :same]
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

    def shared(self, block_size: int | None = None) -> tuple[Tensor, Tensor]:
        """The spans as the op takes them, cut to whole blocks."""
        size = block_size or self.shape.block_size
        spans = [(span.first, span.count) for span in self.spans]
        lens = [span.tokens // size * size for span in self.spans]
        return (
            torch.tensor(spans, dtype=torch.int32).view(-1, 2),
            torch.tensor(lens, dtype=torch.int32),
        )

    def dense(self, *, softcap: float = 0.0, window: int = 0) -> Tensor:
        """Float64 attention of the new rows, one sequence and one head at a time."""
        outputs = []
        for q_len, q, k, v in zip(self.q_lens, self.q, self.k, self.v, strict=True):
            group = self.shape.q_heads // self.shape.kv_heads
            keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
            rows = q[len(q) - q_len :].double()
            scores = torch.einsum("qhd,khd->hqk", rows, keys) * self.shape.dim**-0.5
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            position = torch.arange(len(q) - q_len, len(q)).unsqueeze(-1)
            key = torch.arange(len(q))
            seen = key <= position
            if window:
                seen &= key > position - window
            scores = scores.masked_fill(~seen, -torch.inf)
            if self.sinks is not None:
                sinks = self.sinks.double().view(-1, 1, 1).expand(-1, q_len, 1)
                scores = torch.cat([scores, sinks], -1)
            weights = scores.softmax(-1)[..., : len(q)]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)


MIXED = ((1, 1), (1, 63), (17, 17), (5, 40), (1, 100), (33, 133), (1, 16))
LONG = ((1, 1100), (40, 530), (1, 512), (3, 1030), (1, 513))
"""Softmax goes by chunks of 512 keys."""

SHAPES = {
    "grouped": Shape(),
    "odd_dim": Shape(q_heads=6, kv_heads=3, dim=20, block_size=5),
    "pair_and_a_half": Shape(q_heads=4, kv_heads=2, dim=37, block_size=7),
    "seven_per_head": Shape(q_heads=7, kv_heads=1, dim=64, block_size=8),
    "many_heads": Shape(q_heads=40, kv_heads=1, dim=16, block_size=1),
    "no_groups": Shape(q_heads=3, kv_heads=3, dim=128, block_size=64),
    "half_vector": Shape(q_heads=8, kv_heads=2, dim=80, block_size=16),
    "wide": Shape(q_heads=4, kv_heads=2, dim=72, block_size=3),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"window": 7}, {"window": 40, "softcap": 5.0}],
    ids=["softcap", "window", "both"],
)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def attend(
    case: Case, *, block_size: int | None = None, backend: str = "cpu", **options: Any
) -> Tensor:
    return paged_attention(
        **case.step(block_size),
        scale=case.shape.dim**-0.5,
        sinks=case.sinks,
        backend=backend,
        **options,
    )


def close(got: Tensor, want: Tensor) -> None:
    tolerance = (2**-8, 1e-5) if got.dtype == torch.bfloat16 else (1e-5, 2e-6)
    torch.testing.assert_close(got.double(), want, rtol=tolerance[0], atol=tolerance[1])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_dense_float64(isa: str, shape: str, dtype: torch.dtype) -> None:
    case = Case.random(SHAPES[shape], MIXED, dtype)
    got = attend(case)
    assert got.dtype == dtype
    close(got, case.dense())


@DTYPES
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_long_contexts(isa: str, dtype: torch.dtype, block_size: int) -> None:
    case = Case.random(Shape(q_heads=4, block_size=block_size), LONG, dtype)
    close(attend(case), case.dense())


@OPTIONS
@pytest.mark.parametrize("segments", [MIXED, LONG], ids=["mixed", "long"])
def test_softcap_and_window(
    isa: str, options: dict[str, Any], segments: Sequence[tuple[int, int]]
) -> None:
    case = Case.random(Shape(q_heads=4), segments, torch.float32)
    close(attend(case, **options), case.dense(**options))


@DTYPES
@pytest.mark.parametrize("segments", [MIXED, LONG], ids=["mixed", "long"])
def test_sinks(isa: str, dtype: torch.dtype, segments: Sequence[tuple[int, int]]) -> None:
    case = Case.random(Shape(q_heads=4), segments, dtype, sinks=True)
    want = attend(case)
    close(want, case.dense())
    assert case.sinks is not None
    assert torch.equal(attend(replace(case, sinks=case.sinks.float())), want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 9])
def test_reference_in_float64(shape: str, window: int) -> None:
    case = Case.random(SHAPES[shape], MIXED, torch.float64, sinks=True)
    got = attend(case, backend="auto", window=window)
    torch.testing.assert_close(got, case.dense(window=window), rtol=1e-12, atol=1e-12)


@DTYPES
def test_new_keys_and_values_reach_the_cache(isa: str, dtype: torch.dtype) -> None:
    case = Case.random(Shape(dim=20), MIXED, dtype)
    step = case.step()
    paged_attention(**step, scale=1.0, backend="cpu")
    for cache, new in (("k_cache", "k"), ("v_cache", "v")):
        assert torch.equal(step[cache].flatten(0, 1)[step["slots"]], step[new])


@DTYPES
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads_blocks_or_batch(isa: str, dtype: torch.dtype) -> None:
    case = Case.random(Shape(q_heads=6), (*MIXED, (2, 700)), dtype)
    want = attend(case)
    for count in (1, 2, 3):
        _core.set_num_threads(count)
        assert torch.equal(attend(case), want)
    for block_size in (1, 3, 64):
        assert torch.equal(attend(case, block_size=block_size), want)
    start = 0
    for s, q_len in enumerate(case.q_lens):
        alone = case.segment(s, case.kv_lens[s] - q_len, case.kv_lens[s])
        assert torch.equal(attend(alone), want[start : start + q_len])
        start += q_len


@DTYPES
@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.usefixtures("threads")
def test_bits_of_a_long_row_do_not_depend_on_how_many_threads_split_it(
    isa: str, dtype: torch.dtype, window: int
) -> None:
    case = Case.random(Shape(q_heads=8, dim=64), ((1, 6000), (1, 40), (2, 2000)), dtype, sinks=True)
    _core.set_num_threads(1)
    want = attend(case, window=window)
    for count in (2, 64):
        _core.set_num_threads(count)
        assert torch.equal(attend(case, window=window), want)
    close(want, case.dense(window=window))


@DTYPES
@pytest.mark.parametrize("window", [0, 11, 520])
def test_bits_do_not_depend_on_chunking(isa: str, dtype: torch.dtype, window: int) -> None:
    case = Case.random(Shape(q_heads=6), [(600, 600)], dtype)
    want = attend(case, window=window)
    close(want, case.dense(window=window))
    for begin, end in ((0, 1), (0, 40), (40, 77), (76, 77), (31, 50), (500, 530), (599, 600)):
        got = attend(case.segment(0, begin, end), window=window)
        assert torch.equal(got, want[begin:end])


GROUPS = ((7, 7), (1, 30), *[(1, 65 + 3 * i) for i in range(5)], (1, 9), *[(1, 550)] * 2, (4, 20))
GROUP_SPANS = (Span(2, 5, 48), Span(8, 2, 528))


@DTYPES
@OPTIONS
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.usefixtures("threads")
def test_shared_prefixes_change_no_bit(
    isa: str, dtype: torch.dtype, options: dict[str, Any], block_size: int
) -> None:
    shape = Shape(q_heads=4, block_size=block_size)
    case = Case.random(shape, GROUPS, dtype, spans=GROUP_SPANS, sinks=True)
    for chosen in ({}, options):
        want = attend(case, **chosen)
        for count in (1, 2, 5):
            _core.set_num_threads(count)
            assert torch.equal(attend(case, shared=case.shared(), **chosen), want)
        close(want, case.dense(**chosen))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_larger_than_a_work_item(isa: str, shape: str) -> None:
    size = SHAPES[shape].block_size
    spans = (Span(0, 37, 100 // size * size), Span(37, 2, 0))
    case = Case.random(SHAPES[shape], [(1, 101 + i) for i in range(39)], torch.float32, spans=spans)
    assert torch.equal(attend(case, shared=case.shared()), attend(case))


@DTYPES
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding(isa: str, dtype: torch.dtype, backend: str) -> None:
    case = Case.random(Shape(), MIXED, dtype)
    step, want = case.step(), attend(case, backend=backend)
    before = len(step["q"])
    caches = {name: step[name].clone() for name in ("k_cache", "v_cache")}
    for name in ("q", "k", "v"):
        step[name] = torch.cat([step[name], torch.full_like(step[name][:3], torch.nan)])
    step["slots"] = torch.cat([step["slots"], torch.full((3,), -1)])
    step["cu_q"] = torch.cat([step["cu_q"], torch.tensor([before + 1, before + 3]).int()])
    step["kv_lens"] = torch.cat([step["kv_lens"], torch.zeros(2, dtype=torch.int32)])
    step["block_tables"] = torch.cat([step["block_tables"], step["block_tables"][:2] * 0 - 1])
    options = {"scale": case.shape.dim**-0.5, "backend": backend}
    got = paged_attention(**step, **options)  # type: ignore[arg-type]
    assert torch.equal(got[:before], want)
    assert torch.equal(got[before:], torch.zeros_like(got[before:]))
    sunk = paged_attention(**step, sinks=torch.zeros(8), **options)  # type: ignore[arg-type]
    assert torch.equal(sunk[before:], torch.zeros_like(got[before:]))
    written = step["slots"][:before]
    for name, cache in caches.items():
        cache.flatten(0, 1)[written] = step[name].flatten(0, 1)[written]
        torch.testing.assert_close(step[name], cache, rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_and_no_rows(isa: str) -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    step, want = case.step(), attend(case)
    options = {"scale": case.shape.dim**-0.5, "backend": "cpu"}
    packed = torch.cat([step["q"], step["k"], step["v"]], dim=1)
    sliced = dict(zip("qkv", packed.split([8, 2, 2], dim=1), strict=True))
    assert torch.equal(paged_attention(**{**step, **sliced}, **options), want)  # type: ignore[arg-type]
    heads_first = {n: step[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "qkv"}
    assert torch.equal(paged_attention(**{**step, **heads_first}, **options), want)  # type: ignore[arg-type]
    empty = {name: step[name][:0] for name in ("q", "k", "v", "slots", "kv_lens", "block_tables")}
    rest = {"cu_q": torch.zeros(1, dtype=torch.int32), "k_cache": step["k_cache"]}
    out = paged_attention(**empty, **rest, v_cache=step["v_cache"], scale=1.0, backend="cpu")
    assert out.shape == (0, 8, 32)


def test_a_row_without_finite_scores_is_nan_and_alone(isa: str) -> None:
    case = Case.random(Shape(), ((1, 20), (1, 700), (1, 20)), torch.float32)
    want = attend(case)
    case.q[1][-1] = torch.nan
    got = attend(case)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert bool(got[1].isnan().all())


def test_runs_under_inference_mode(isa: str) -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    with torch.inference_mode():
        got = attend(case)
    assert torch.equal(got, attend(case))


def rejects(case: Case, error: type[Exception], message: str, **change: Any) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**{**case.step(), **change}, scale=1.0, backend="cpu")


def test_bad_arguments_are_named() -> None:
    case = Case.random(Shape(), MIXED, torch.float32)
    step = case.step()
    rejects(case, TypeError, "k: want float32 like q, got bfloat16", k=step["k"].bfloat16())
    rejects(
        case,
        ValueError,
        r"v: want shape \[59, 2, 32\], got shape \[59, 2, 31\]",
        v=step["v"][..., 1:],
    )
    columns = step["q"].transpose(1, 2).contiguous().transpose(1, 2)
    rejects(case, ValueError, "q: want the last dimension packed", q=columns)
    rejects(case, TypeError, "slots: want int64, got int32", slots=step["slots"].int())
    rejects(
        case, ValueError, r"slots\[0\] is 10000, but there are", slots=step["slots"] * 0 + 10000
    )
    rejects(case, ValueError, "cu_q must run from 0 to 59", cu_q=step["cu_q"] + 1)
    rejects(case, ValueError, "has 1 query rows .* and -1 keys", kv_lens=step["kv_lens"] * 0 - 1)
    rejects(case, ValueError, "has 17 query rows .* and 1 keys", kv_lens=step["kv_lens"] * 0 + 1)
    rejects(
        case,
        ValueError,
        r"block_tables\[1, 0\] is -1, but the cache has",
        block_tables=torch.cat([step["block_tables"][:1], step["block_tables"][1:] * 0 - 1]),
    )
    rejects(
        case,
        ValueError,
        "segment 1 needs 4 blocks for 63 keys",
        block_tables=step["block_tables"][:, :2].contiguous(),
    )
    rejects(case, TypeError, "kv_lens: want a torch.Tensor, got list", kv_lens=[1])
    rejects(case, ValueError, r"sinks: want shape \[8\]", sinks=torch.zeros(7))
    rejects(case, TypeError, "sinks: want float32 like q", sinks=torch.zeros(8).double())


@pytest.mark.parametrize(
    ("spans", "lens", "message"),
    [
        ([[2, 5], [6, 2]], [48, 0], r"spans\[1\] is \(6, 2\), want ascending runs of the 11 segm"),
        ([[9, 3]], [0], r"spans\[0\] is \(9, 3\)"),
        ([[2, 5]], [40], r"lens\[0\] is 40, want a multiple of the block size 16"),
        ([[0, 2]], [0], r"segment 0 of shared spans\[0\] has 7 query rows and 7 keys"),
        (
            [[1, 2]],
            [32],
            r"segment 1 of shared spans\[0\] has 1 query rows and 30 keys",
        ),
        (
            [[1, 2]],
            [16],
            r"segment 2 of shared spans\[0\] does not begin with the 1 blocks",
        ),
    ],
    ids=["overlap", "outside", "part_block", "prefill", "short", "other_blocks"],
)
def test_bad_spans_are_named(spans: list[list[int]], lens: list[int], message: str) -> None:
    case = Case.random(Shape(), GROUPS, torch.float32, spans=GROUP_SPANS)
    shared = torch.tensor(spans, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
    rejects(case, ValueError, message, shared=shared)


@DTYPES
@pytest.mark.parametrize("backend", ["cpu", "reference"])
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
