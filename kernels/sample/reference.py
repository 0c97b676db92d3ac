"""Sampling in plain torch: any device; float64 logits are computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    ban_rows: Tensor,
    ban_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, log-probabilities and kept masses [N]; shapes as in the public function."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits[rows.long()].to(dtype)
    scores[ban_rows.long(), ban_ids.long()] = -torch.inf
    greedy = temperatures == 0
    scores = scores / torch.where(greedy, 1.0, temperatures).to(dtype).unsqueeze(-1)
    bad = ~scores.amax(-1).isfinite()
    scores = scores.masked_fill(bad.unsqueeze(-1), 0.0)
    total = scores.logsumexp(-1)
    truncated = ~greedy & ((top_ks > 0) | (top_ps < 1) | (min_ps > 0))
    if bool(truncated.any()):
        threshold = _threshold(scores, total, top_ks, top_ps, min_ps)
        threshold = torch.where(truncated, threshold, -torch.inf)
        scores = scores.masked_fill(scores < threshold.unsqueeze(-1), -torch.inf)
    kept = torch.where(truncated, (scores.logsumexp(-1) - total).exp(), 1.0)
    tokens = torch.where(greedy, scores.argmax(-1), _invert_cdf(scores, uniforms))
    logprobs = scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return (
        tokens.masked_fill(bad, -1),
        logprobs.masked_fill(bad, torch.nan),
        kept.to(dtype).masked_fill(bad, torch.nan),
    )


def _threshold(
    scores: Tensor, total: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
) -> Tensor:
    """The smallest kept score [N]: the largest of the three cuts."""
    ordered = scores.sort(-1, descending=True).values
    size = scores.shape[-1]
    last = torch.where((top_ks > 0) & (top_ks < size), top_ks, size).long().unsqueeze(-1) - 1
    by_count = ordered.gather(-1, last)
    mass = (ordered.double() - total.double().unsqueeze(-1)).exp()
    mass = mass.masked_fill(ordered < by_count, 0.0).cumsum(-1)
    wanted = top_ps.double().unsqueeze(-1) * mass[:, -1:]
    reached = (mass < wanted).sum(-1, keepdim=True).clamp(max=size - 1)
    by_mass = torch.where(top_ps.unsqueeze(-1) < 1, ordered.gather(-1, reached), -torch.inf)
    by_ratio = ordered[:, :1] + min_ps.to(scores.dtype).clamp(0, 1).log().unsqueeze(-1)
    return torch.maximum(torch.maximum(by_count, by_mass), by_ratio).squeeze(-1)


def _invert_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    target = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    positions = torch.arange(scores.shape[-1], device=scores.device)
    last = torch.where(scores > -torch.inf, positions, 0).amax(-1)
    return torch.minimum(tokens, last)
