"""The sampler against its float64 reference, and against what a distribution must look like."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.sample import Draws, sample

TRUNCATIONS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_k_one": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p_zero": {"top_p": 0.0},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every instruction set of this CPU."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def draw(
    logits: Tensor,
    *,
    uniforms: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: tuple[list[int], list[int]] = ([], []),
    backend: str = "cpu",
) -> Draws:
    """Sample with one setting for all samples."""
    count = len(uniforms)
    return sample(
        logits,
        rows=torch.arange(count, dtype=torch.int32) if rows is None else rows,
        uniforms=uniforms,
        temperatures=torch.full((count,), temperature),
        top_ks=torch.full((count,), top_k, dtype=torch.int32),
        top_ps=torch.full((count,), top_p),
        min_ps=torch.full((count,), min_p),
        banned=tuple(torch.tensor(part, dtype=torch.int32) for part in banned),  # type: ignore[arg-type]
        backend=backend,
    )


def random_logits(rows: int, vocab: int, *, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    return torch.randn(rows, vocab, generator=generator) * spread


def random_uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def assert_same_draws(got: Draws, want: Draws) -> None:
    """Tokens agree but where the uniform number falls on a border of the two roundings."""
    same = got.tokens == want.tokens
    assert same.double().mean() > 0.97
    torch.testing.assert_close(got.logprobs[same].double(), want.logprobs[same], rtol=0, atol=2e-5)
    torch.testing.assert_close(got.kept_mass.double(), want.kept_mass, rtol=0, atol=2e-5)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("vocab", [1, 3, 63, 100, 257, 2047])
def test_matches_float64_reference(isa: str, vocab: int, truncation: str) -> None:
    logits, uniforms = random_logits(61, vocab), random_uniforms(61)
    settings = {"temperature": 0.7, **TRUNCATIONS[truncation]}
    want = draw(logits.double(), uniforms=uniforms, backend="reference", **settings)  # type: ignore[arg-type]
    assert_same_draws(draw(logits, uniforms=uniforms, **settings), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.01, 30.0], ids=["flat", "peaked"])
def test_extreme_distributions(isa: str, spread: float) -> None:
    logits, uniforms = random_logits(33, 1000, spread=spread), random_uniforms(33)
    for settings in TRUNCATIONS.values():
        want = draw(logits.double(), uniforms=uniforms, backend="reference", **settings)  # type: ignore[arg-type]
        assert_same_draws(draw(logits, uniforms=uniforms, **settings), want)  # type: ignore[arg-type]


def test_large_vocabulary(isa: str) -> None:
    logits, uniforms = random_logits(5, 151_936), random_uniforms(5)
    for settings in TRUNCATIONS.values():
        want = draw(logits.double(), uniforms=uniforms, backend="reference", **settings)  # type: ignore[arg-type]
        assert_same_draws(draw(logits, uniforms=uniforms, **settings), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_bfloat16_logits(isa: str, truncation: str) -> None:
    logits, uniforms = random_logits(61, 100).bfloat16(), random_uniforms(61)
    settings = TRUNCATIONS[truncation]
    want = draw(logits.double(), uniforms=uniforms, backend="reference", **settings)  # type: ignore[arg-type]
    assert_same_draws(draw(logits, uniforms=uniforms, **settings), want)  # type: ignore[arg-type]


def test_greedy_takes_first_maximum_at_temperature_one(isa: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    got = draw(logits, uniforms=torch.tensor([0.99]), temperature=0.0, top_k=1, top_p=0.1)
    assert got.tokens.tolist() == [1]
    torch.testing.assert_close(got.logprobs, logits.log_softmax(-1)[:, 1])
    assert got.kept_mass.tolist() == [1.0]


def test_banned_entries_have_no_probability(isa: str) -> None:
    logits = random_logits(1, 37)
    uniforms = torch.linspace(0, 0.9999999, 500)
    rows = torch.zeros(500, dtype=torch.int32)
    banned = ([i for i in range(500) for _ in range(3)], [0, 17, 36] * 500)
    got = draw(logits, uniforms=uniforms, rows=rows, banned=banned)
    assert not {0, 17, 36} & set(got.tokens.tolist())
    logits[0, [0, 17, 36]] = -torch.inf
    want = logits.log_softmax(-1)[0, got.tokens]
    torch.testing.assert_close(got.logprobs, want, rtol=0, atol=2e-6)


def test_bans_are_per_sample(isa: str) -> None:
    logits = torch.tensor([[0.0, 10.0, 5.0]])
    rows = torch.zeros(3, dtype=torch.int32)
    uniforms = torch.full((3,), 0.5)
    got = draw(logits, uniforms=uniforms, rows=rows, banned=([1, 2, 2], [1, 2, 1]))
    assert got.tokens.tolist() == [1, 2, 0]
    assert logits.tolist() == [[0.0, 10.0, 5.0]]


def test_ties_stay_together(isa: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.0]]).expand(64, 5)
    uniforms = torch.linspace(0, 0.999, 64)
    for settings in ({"top_k": 2}, {"top_p": 0.3}):
        got = draw(logits.contiguous(), uniforms=uniforms, **settings)  # type: ignore[arg-type]
        assert set(got.tokens.tolist()) == {0, 2, 3}
        torch.testing.assert_close(got.logprobs.exp(), torch.full((64,), 1 / 3))


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_chi_square(isa: str, truncation: str) -> None:
    """Draws with independent uniforms follow the truncated distribution (p = 1e-4 bound)."""
    logits, settings = random_logits(1, 23, spread=1.0), TRUNCATIONS[truncation]
    count = 20_000
    rows = torch.zeros(count, dtype=torch.int32)
    got = draw(logits, uniforms=random_uniforms(count, 7), rows=rows, **settings)  # type: ignore[arg-type]
    expected = torch.zeros(23).index_put((got.tokens,), got.logprobs.exp())
    assert expected.sum() == pytest.approx(1.0, abs=1e-4)
    kept = expected > 0
    counts = torch.bincount(got.tokens, minlength=23)[kept]
    chi2 = ((counts - count * expected[kept]) ** 2 / (count * expected[kept])).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 <= freedom + 4 * (2 * freedom) ** 0.5 + 10


def test_uniform_selects_by_vocabulary_order(isa: str) -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(5, 3).contiguous()
    got = draw(logits, uniforms=torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76]))
    assert got.tokens.tolist() == [0, 0, 1, 1, 2]


def test_results_do_not_depend_on_threads_or_batch(isa: str) -> None:
    logits, uniforms = random_logits(97, 2047), random_uniforms(97)
    settings = {"temperature": 0.9, "top_p": 0.95}
    threads = _core.num_threads()
    whole = draw(logits, uniforms=uniforms, **settings)  # type: ignore[arg-type]
    try:
        for count in (1, 2, 3):
            _core.set_num_threads(count)
            for a, b in zip(whole, draw(logits, uniforms=uniforms, **settings), strict=True):  # type: ignore[arg-type]
                assert torch.equal(a, b)
    finally:
        _core.set_num_threads(threads)
    for row in (0, 50, 96):
        alone = draw(logits[row : row + 1], uniforms=uniforms[row : row + 1], **settings)  # type: ignore[arg-type]
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_strided_rows_and_no_samples(isa: str) -> None:
    wide = random_logits(7, 200)
    uniforms = random_uniforms(7)
    sliced = draw(wide[:, 30:130], uniforms=uniforms)
    packed = draw(wide[:, 30:130].contiguous(), uniforms=uniforms)
    assert all(torch.equal(a, b) for a, b in zip(sliced, packed, strict=True))
    assert draw(wide, uniforms=torch.empty(0)).tokens.shape == (0,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_row_without_distribution_gets_no_token(
    poison: float, temperature: float, backend: str
) -> None:
    logits = random_logits(3, 50)
    settings = {"uniforms": random_uniforms(3), "temperature": temperature, "backend": backend}
    want = draw(logits, **settings)  # type: ignore[arg-type]
    logits[1, 49] = poison
    got = draw(logits, **settings)  # type: ignore[arg-type]
    assert got.tokens[1] == -1
    assert got.logprobs[1].isnan()
    assert got.kept_mass[1].isnan()
    for column, expected in zip(got, want, strict=True):
        assert torch.equal(column[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_everything_banned_gets_no_token(backend: str) -> None:
    got = draw(torch.zeros(1, 2), uniforms=torch.zeros(1), banned=([0, 0], [0, 1]), backend=backend)
    assert got.tokens.tolist() == [-1]


def test_bad_arguments_are_named() -> None:
    logits, uniforms = random_logits(2, 9), random_uniforms(2)
    rows = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sample_rows\[1\] is 2, but there are 2 rows of logits"):
        draw(logits, uniforms=uniforms, rows=rows)
    with pytest.raises(ValueError, match=r"ban_ids\[0\] is 9, but there are 9 tokens"):
        draw(logits, uniforms=uniforms, banned=([0], [9]))
    with pytest.raises(ValueError, match=r"uniforms\[0\] is 1, want a number in \[0, 1\)"):
        draw(logits, uniforms=torch.ones(2))
    with pytest.raises(ValueError, match=r"temperatures\[0\] is -1"):
        draw(logits, uniforms=uniforms, temperature=-1.0)
    with pytest.raises(TypeError, match="sample_rows: want int32, got int64"):
        draw(logits, uniforms=uniforms, rows=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="sample cannot run on 'triton' here"):
        draw(logits, uniforms=uniforms, backend="triton")


def test_float64_logits_take_the_reference() -> None:
    got = draw(random_logits(4, 20).double(), uniforms=random_uniforms(4), backend="auto")
    assert got.logprobs.dtype == torch.float64
