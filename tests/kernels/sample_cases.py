"""Ways to call the sampler that its tests share."""

from __future__ import annotations

import torch
from torch import Tensor

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
