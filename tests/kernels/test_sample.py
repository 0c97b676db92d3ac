"""The sampler against its float64 reference, and against what a distribution must look like."""

from __future__ import annotations

import pytest
import torch
from sample_cases import TRUNCATIONS, draw, random_logits, random_uniforms

from eapo_fast import _core
from eapo_fast.kernels.sample import Draws


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


HARD_ROWS = {
    "all equal": lambda x: x * 0 + 7,
    "two values": lambda x: (x > 0).float(),
    "few finite": lambda x: x.where(x > 3, -torch.inf),
    "mostly masked": lambda x: x.where(x > 2, -1e9),
    "wide": lambda x: x * 1e30,
    "widest": lambda x: torch.sign(x) * torch.finfo(torch.float32).max,
    "narrow": lambda x: 1 + x * 1e-7,
    "tiny": lambda x: x * 1e-40,
}


@pytest.mark.parametrize("kind", HARD_ROWS)
def test_truncation_of_hard_rows(isa: str, kind: str) -> None:
    """The kept set is the reference's."""
    logits, uniforms = HARD_ROWS[kind](random_logits(9, 3001, spread=1.0)), random_uniforms(9)
    settings = [{"top_k": k} for k in (1, 2, 33, 700, 3000)] + [{"top_p": p} for p in (1e-6, 0.5)]
    for setting in settings:
        want = draw(logits.double(), uniforms=uniforms, backend="reference", **setting)  # type: ignore[arg-type]
        got = draw(logits, uniforms=uniforms, **setting)  # type: ignore[arg-type]
        torch.testing.assert_close(got.kept_mass.double(), want.kept_mass, rtol=0, atol=2e-5)
        torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=0, atol=2e-5)


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
