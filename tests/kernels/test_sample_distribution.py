"""What many draws look like: chi-square against float64, log-probabilities, independence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sample_cases import TRUNCATIONS, draw, random_logits, random_uniforms

from eapo_fast import _core
from eapo_fast.kernels.sample import Draws

VOCAB = 300
DRAWS = 200_000
BANNED = [0, 17, 255, 256, 299]
Array = NDArray[np.float64]


def distribution(
    logits: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """Probabilities [V] by sorting, in float64."""
    scores = logits / np.float32(temperature)
    weights = np.exp(scores - scores.max())
    order = np.sort(weights)[::-1]
    if top_k:
        weights[weights < order[min(top_k, len(order)) - 1]] = 0
    if top_p < 1:
        order = np.sort(weights)[::-1]
        reached = np.searchsorted(order.cumsum(), np.float32(top_p) * weights.sum())
        weights[weights < order[reached]] = 0
    weights[weights < np.float32(min_p)] = 0
    return np.asarray(weights / weights.sum())


def chi_square_z(counts: NDArray[np.int64], expected: Array) -> float:
    """Pearson's statistic as a standard normal number (Wilson and Hilferty); rare cells pooled."""
    order = np.argsort(expected)
    rare = int((np.cumsum(expected[order]) < 10).sum())
    starts = (
        np.concatenate(([0], np.arange(rare + 1, len(order)))) if rare else np.arange(len(order))
    )
    counts = np.add.reduceat(counts[order], starts)
    expected = np.add.reduceat(expected[order], starts)
    freedom = len(expected) - 1
    ratio = float(((counts - expected) ** 2 / expected).sum()) / freedom
    spread = 2 / (9 * freedom)
    return float((ratio ** (1 / 3) - (1 - spread)) / spread**0.5)


def many_draws(logits: torch.Tensor, banned: list[int], **settings: Any) -> Draws:
    samples = [i for i in range(DRAWS) for _ in banned]
    return draw(
        logits,
        uniforms=random_uniforms(DRAWS, 7),
        rows=torch.zeros(DRAWS, dtype=torch.int32),
        banned=(samples, banned * DRAWS),
        **settings,
    )


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("banned", [[], BANNED], ids=["free", "bans"])
@pytest.mark.parametrize(
    "truncation", [t for t in TRUNCATIONS if t not in ("top_k_one", "top_p_zero")]
)
def test_draws_follow_the_distribution(
    isa: str, truncation: str, banned: list[int], temperature: float
) -> None:
    logits = random_logits(1, VOCAB, spread=1.5)
    exact = logits[0].double().numpy().copy()
    exact[banned] = -np.inf
    expected = distribution(exact, temperature, **TRUNCATIONS[truncation])
    got = many_draws(logits, banned, temperature=temperature, **TRUNCATIONS[truncation])
    tokens = got.tokens.numpy()
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert abs(chi_square_z(counts[possible], DRAWS * expected[possible])) < 5
    np.testing.assert_allclose(got.logprobs.numpy(), np.log(expected[tokens]), rtol=0, atol=3e-6)
    full = distribution(exact, temperature)
    np.testing.assert_allclose(got.kept_mass.numpy(), full[possible].sum(), rtol=2e-6)


LOGITS = {
    "uniform": lambda shape, g: torch.rand(shape, generator=g) * 100 - 50,
    "normal": lambda shape, g: (torch.randn(shape, generator=g) * 10).clamp(-50, 50),
    "flat": lambda shape, g: torch.full(shape, 50.0),
    "one above many": lambda shape, g: (torch.rand(shape, generator=g) + 37).index_fill_(
        1, torch.tensor([70_001]), 50.0
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("kind", LOGITS)
def test_logprobs_are_exact_to_1e_5(isa: str, kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = LOGITS[kind]((6, 151_936), generator)
    got = draw(logits, uniforms=random_uniforms(6), temperature=temperature)
    exact = logits.double() / (float(np.float32(temperature)) or 1.0)
    want = exact.log_softmax(-1).gather(1, got.tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.logprobs.double(), want, rtol=0, atol=1e-5)


def test_samples_of_a_group_are_independent() -> None:
    """Two samples of one prompt agree as often as two draws of the distribution do."""
    samples, positions = 8, 3000
    logits = random_logits(1, 50, spread=1.0)
    uniforms = torch.tensor(
        [
            _core.keyed_uniform(5, "sample", [1, 2, sample, position])
            for sample in range(samples)
            for position in range(positions)
        ]
    )
    rows = torch.zeros(len(uniforms), dtype=torch.int32)
    tokens = draw(logits, uniforms=uniforms, rows=rows).tokens.view(samples, positions)
    agree = (tokens[:, None] == tokens[None]).double().mean(-1)
    p = logits[0].double().softmax(-1)
    chance = float((p**2).sum())
    spread = (chance * (1 - chance) / positions) ** 0.5
    pairs = agree[torch.triu(torch.ones(samples, samples), 1) > 0]
    assert (pairs - chance).abs().max() < 5 * spread
