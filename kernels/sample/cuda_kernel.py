"""The sampler in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast import _cuda


def sample(
    logits: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    ban_samples: Tensor,
    ban_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, log-probabilities and kept masses [N]; shapes as in the public function."""
    count, device = len(rows), logits.device
    tiles = -(-logits.shape[1] // _cuda.SAMPLE_TILE)
    tops, sums = (torch.empty(count, tiles, device=device) for _ in range(2))
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs, kept = (torch.empty(count, device=device) for _ in range(2))
    _cuda.sample(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        rows,
        uniforms,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        ban_samples,
        ban_ids,
        tops,
        sums,
        tokens,
        logprobs,
        kept,
    )
    return tokens, logprobs, kept
