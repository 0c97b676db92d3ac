"""The policy losses once more, sequence by sequence and differentiated by autograd."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_fast.recipes import Recipe

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "base_recipes.json"


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def golden_cases(*methods: str) -> list[dict[str, Any]]:
    """Published values, computed in float64 outside this project, by method name."""
    return [case for case in json.loads(GOLDEN.read_text()) if case["method"] in methods]


def naive_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy from the whole matrix of logits."""
    vocab = vocab_size or len(weight)
    logits = hidden @ weight[:vocab].T
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    if bias is not None:
        forbidden |= torch.isneginf(bias[:vocab])
        logits = logits + torch.where(torch.isneginf(bias[:vocab]), 0.0, bias[:vocab])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if banned is not None:
        forbidden[banned] = True
    log_p = (logits / temperature).masked_fill(forbidden, -1e30).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).masked_fill(forbidden, 0.0).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def policy_loss(
    recipe: Recipe,
    logprob: Tensor,
    old: Tensor,
    advantages: Tensor,
    cu_seqlens: list[int],
    mask: Tensor,
    entropy: Tensor | None = None,
    ref: Tensor | None = None,
    factor: Tensor | None = None,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (differentiable) and token losses [N]."""
    spans = list(itertools.pairwise(cu_seqlens))
    rows = [[t for t in range(*span) if mask[t]] for span in spans]
    tokens = num_tokens or max(sum(map(len, rows)), 1)
    sequences = num_sequences or max(sum(map(bool, rows)), 1)
    total = logprob.new_zeros(())
    token_loss = torch.zeros_like(logprob)
    for i, live in enumerate(rows):
        if not live:
            continue
        advantage = advantages[live] if len(advantages) == len(logprob) else advantages[i]
        loss = _surrogate(recipe, logprob[live], old[live], advantage)
        if factor is not None:
            loss = loss * factor[live]
        if recipe.beta:
            assert ref is not None
            loss = loss + recipe.beta * _kl(recipe.kl, logprob[live] - ref[live])
        if recipe.entropy_coef:
            assert entropy is not None
            loss = loss - recipe.entropy_coef * entropy[live]
        token_loss[live] = loss.detach()
        share = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / (len(live) * sequences),
            "seq-mean-token-sum": 1 / sequences,
            "seq-mean-token-sum-norm": 1 / (sequences * (recipe.max_length or 1)),
            "token-sum-norm": 1 / (recipe.max_length or 1),
        }[recipe.aggregation]
        total = total + loss.sum() * share
    return total, token_loss


def _surrogate(recipe: Recipe, logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    high = recipe.epsilon if recipe.epsilon_high is None else recipe.epsilon_high
    drift = logprob - old
    if recipe.surrogate == "geo_mean":
        sign = advantage.sign()
        bounded = sign * torch.minimum(sign * drift, sign * drift.clamp(-recipe.epsilon, high))
        return -advantage * bounded.mean().clamp(-20, 20).exp().expand(len(drift))
    if recipe.surrogate == "reinforce":
        return -advantage * logprob
    if recipe.ratio == "token":
        ratio = drift.clamp(-20, 20).exp()
    elif recipe.ratio == "sequence":
        ratio = drift.mean().clamp(-20, 10).exp().expand(len(drift))
    else:
        ratio = (logprob - logprob.detach() + drift.mean().detach()).clamp(-20, 10).exp()
    if recipe.surrogate == "none":
        return -advantage * ratio
    clipped = ratio.clamp(1 - recipe.epsilon, 1 + high)
    if recipe.surrogate == "detached_clip":
        return -clipped.detach() * advantage * logprob
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if recipe.delta is not None:
        bound = torch.minimum(loss, -advantage * recipe.delta)
        loss = torch.where(torch.as_tensor(advantage < 0), bound, loss)
    return loss


def _kl(kind: str, excess: Tensor) -> Tensor:
    if kind == "k1":
        return excess
    if kind == "abs":
        return excess.abs()
    if kind == "k2":
        return 0.5 * excess**2
    excess = excess.clamp(-20, 20)
    return torch.exp(-excess) + excess - 1
