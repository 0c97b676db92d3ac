"""The sampler on a GPU backend against float64, and what a draw must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels.sample import Draws, sample

TRUNCATIONS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_k_one": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p_zero": {"top_p": 0.0},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
}
NO_BANS: tuple[list[int], list[int]] = ([], [])


def draw(
    logits: Tensor,
    uniforms: Tensor,
    backend: str,
    *,
    rows: list[int] | None = None,
    banned: tuple[list[int], list[int]] = NO_BANS,
    **settings: float,
) -> Draws:
    """Sample with one setting for all; logits may be on any device, results are on the CPU."""
    device, count = logits.device, len(uniforms)

    def each(name: str, default: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), settings.get(name, default), dtype=dtype, device=device)

    got = sample(
        logits,
        rows=torch.tensor(rows or range(count), dtype=torch.int32, device=device),
        uniforms=uniforms.to(device),
        temperatures=each("temperature", 1.0),
        top_ks=each("top_k", 0, torch.int32),
        top_ps=each("top_p", 1.0),
        min_ps=each("min_p", 0.0),
        banned=tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in banned),  # type: ignore[arg-type]
        backend=backend,
    )
    return Draws(*(column.cpu() for column in got))


def random_logits(rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    return torch.randn(rows, vocab, generator=generator) * spread


def random_uniforms(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(count))


def check(
    logits: Tensor, uniforms: Tensor, backend: str, device: torch.device, **how: Any
) -> Draws:
    """Compare with float64; a uniform number on a border may fall on either side of it."""
    want = draw(logits.double(), uniforms, "reference", **how)
    got = draw(logits.to(device), uniforms, backend, **how)
    same = got.tokens == want.tokens
    assert same.double().mean() > 0.97
    torch.testing.assert_close(got.logprobs[same].double(), want.logprobs[same], rtol=0, atol=2e-5)
    torch.testing.assert_close(got.kept_mass.double(), want.kept_mass, rtol=0, atol=2e-5)
    return got


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("vocab", [1, 3, 100, 5000])
def test_matches_float64(vocab: int, truncation: str, backend: str, device: torch.device) -> None:
    how = {"temperature": 0.7, **TRUNCATIONS[truncation]}
    check(random_logits(3, vocab), random_uniforms(3), backend, device, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Many equal logits: those that equal the last kept one are kept."""
    for settings in TRUNCATIONS.values():
        logits = random_logits(4, 300).to(dtype)
        check(logits, random_uniforms(4), backend, device, **settings)


@pytest.mark.parametrize("spread", [0.01, 30.0], ids=["flat", "peaked"])
def test_extreme_distributions(spread: float, backend: str, device: torch.device) -> None:
    for settings in ({}, TRUNCATIONS["all"], {"temperature": 1e-3}, {"temperature": 50.0}):
        logits = random_logits(3, 3000, spread)
        check(logits, random_uniforms(3), backend, device, **settings)


def test_large_vocabulary(backend: str, device: torch.device) -> None:
    logits = random_logits(2, 151_936)
    check(logits, random_uniforms(2), backend, device)
    check(logits[:1], random_uniforms(1), backend, device, top_p=0.95)


def test_bans_per_sample(backend: str, device: torch.device) -> None:
    """Samples share a row of logits and have bans of their own, some of them twice."""
    logits = random_logits(2, 5000)
    rows = [i % 2 for i in range(10)]
    favourites = logits.topk(3).indices.tolist()
    pairs = [(i, t) for i, row in enumerate(rows) if i % 3 for t in [*favourites[row], 4999, 0]]
    pairs += [*pairs[::7], (9, 4999)]
    banned = ([i for i, _ in pairs], [t for _, t in pairs])
    before = logits.clone()
    for settings in ({}, {"top_k": 3}, {"temperature": 0.0}):
        got = check(
            logits, random_uniforms(10), backend, device, rows=rows, banned=banned, **settings
        )
        assert not set(enumerate(got.tokens.tolist())) & set(pairs)
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_maximum(backend: str, device: torch.device) -> None:
    logits = torch.zeros(2, 9000)
    logits[0, [7, 8000]] = 3.0
    logits[1, [4500, 8000]] = 3.0
    got = draw(logits.to(device), torch.full((2,), 0.99), backend, temperature=0.0, top_k=1)
    assert got.tokens.tolist() == [7, 4500]
    torch.testing.assert_close(
        got.logprobs,
        logits.log_softmax(-1)[:, 7].where(
            torch.tensor([True, False]), logits.log_softmax(-1)[:, 4500]
        ),
    )
    assert got.kept_mass.tolist() == [1.0, 1.0]


def test_uniform_selects_by_vocabulary_order(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(6, 3).contiguous().to(device)
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24])
    assert draw(logits, uniforms, backend).tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_ties_stay_together(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.0]]).expand(8, 5).contiguous().to(device)
    uniforms = torch.linspace(0, 0.999, 8)
    for settings in ({"top_k": 2}, {"top_p": 0.3}):
        got = draw(logits, uniforms, backend, **settings)
        assert set(got.tokens.tolist()) == {0, 2, 3}
        torch.testing.assert_close(got.logprobs.exp(), torch.full((8,), 1 / 3))
    zeros = torch.tensor([[0.0, -0.0, -1.0]]).to(device)
    assert draw(zeros, torch.tensor([0.9]), backend, top_k=1).tokens.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_without_distribution(temperature: float, backend: str, device: torch.device) -> None:
    logits, uniforms = random_logits(5, 2100), random_uniforms(5)
    want = draw(logits.to(device), uniforms, backend, temperature=temperature, top_k=3)
    logits[0, 2099] = torch.nan
    logits[1, 0] = torch.inf
    logits[2] = -torch.inf
    banned = ([3] * 2100, list(range(2100)))
    got = draw(
        logits.to(device), uniforms, backend, temperature=temperature, top_k=3, banned=banned
    )
    assert got.tokens[:4].tolist() == [-1] * 4
    assert got.logprobs[:4].isnan().all()
    assert got.kept_mass[:4].isnan().all()
    for column, expected in zip(got, want, strict=True):
        assert torch.equal(column[4:], expected[4:])


def test_poison_may_be_banned_and_rows_may_be_wrong(backend: str, device: torch.device) -> None:
    logits = random_logits(1, 50)
    logits[0, 13] = torch.nan
    got = draw(
        logits.to(device), random_uniforms(4), backend, rows=[0, 0, 1, -1], banned=([1], [13])
    )
    assert got.tokens[0] == -1
    assert 0 <= got.tokens[1] < 50
    assert got.tokens[2:].tolist() == [-1, -1]


def test_results_do_not_depend_on_the_batch(backend: str, device: torch.device) -> None:
    logits, uniforms = random_logits(5, 4500).to(device), random_uniforms(5)
    for settings in ({}, {"top_p": 0.9}):
        whole = draw(logits, uniforms, backend, **settings)
        for row in (0, 4):
            alone = draw(logits[row : row + 1], uniforms[row : row + 1], backend, **settings)
            for a, b in zip(whole, alone, strict=True):
                assert torch.equal(a[row : row + 1], b)


def test_strided_rows_and_no_samples(backend: str, device: torch.device) -> None:
    wide = random_logits(4, 200).to(device)
    uniforms = random_uniforms(4)
    sliced, turned = wide[:, 31:130], wide[:, 31:130].t().contiguous().t()
    packed = draw(sliced.contiguous(), uniforms, backend)
    for logits in (sliced, turned):
        got = draw(logits, uniforms, backend)
        assert all(torch.equal(a, b) for a, b in zip(got, packed, strict=True))
    assert draw(wide, torch.zeros(0), backend).tokens.shape == (0,)


def test_frequencies(backend: str, device: torch.device) -> None:
    """Draws of evenly spread uniforms hit every token as often as its probability says."""
    logits = random_logits(1, 23, spread=1.0)
    count = 200
    uniforms = (torch.arange(count) + 0.5) / count
    got = draw(logits.to(device), uniforms, backend, rows=[0] * count)
    counts = torch.bincount(got.tokens, minlength=23)
    assert ((counts - count * logits.softmax(-1)[0]).abs() <= 1.01).all()
    assert torch.equal(got.tokens, got.tokens.sort().values)
