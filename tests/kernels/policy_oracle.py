"""The policy losses once more, sequence by sequence and differentiated by autograd."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_fast import recipes
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


def plain_recipes() -> list[str]:
    """Names of the recipes that need no statistics beside log-probabilities and entropy."""
    named = {name: recipes.get(name) for name in recipes.names()}
    return [n for n, r in named.items() if r.locality != "batch-global" and not r.entropy_band]


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
    stats: dict[str, Tensor] | None = None,
    held: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (differentiable) and token losses [N].

    `stats` as in `ops.policy_loss`. `held` has "logprob" and what else the method takes as a
    constant of its gradient; without it, those are the values of this call.
    """
    stats, held = dict(stats or {}), dict(held or {"logprob": logprob.detach()})
    spans = list(itertools.pairwise(cu_seqlens))
    rows = [[t for t in range(*span) if mask[t]] for span in spans]
    tokens = num_tokens or max(sum(map(len, rows)), 1)
    sequences = num_sequences or max(sum(map(bool, rows)), 1)
    per_token = torch.zeros_like(old)
    for i, live in enumerate(rows):
        same = len(advantages) == len(old)
        per_token[live] = (advantages[live] if same else advantages[i]).to(old.dtype)
    batch = Batch(recipe, rows, per_token, old, stats, held)
    total = logprob.new_zeros(())
    token_loss = torch.zeros_like(logprob)
    for i, live in enumerate(rows):
        if not live:
            continue
        loss = _surrogate(recipe, logprob[live], old[live], per_token[live], held["logprob"][live])
        loss = batch.selected(live, logprob, loss) * batch.weight(live)
        if factor is not None:
            loss = loss * factor[live]
        if recipe.beta:
            assert ref is not None
            loss = loss + recipe.beta * _kl(recipe.kl, logprob[live] - ref[live])
        if recipe.entropy_coef:
            assert entropy is not None
            loss = loss - recipe.entropy_coef * (entropy[live] - batch.penalty(i, entropy))
        token_loss[live] = loss.detach()
        share = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / (len(live) * sequences),
            "seq-mean-token-sum": 1 / sequences,
            "seq-mean-token-sum-norm": 1 / (sequences * (recipe.max_length or 1)),
            "token-sum-norm": 1 / (recipe.max_length or 1),
        }[recipe.aggregation]
        total = total + loss.sum() * share
    return total + batch.target(sequences), token_loss


class Batch:
    """What a method knows about a whole batch, token by token in plain Python."""

    def __init__(
        self,
        recipe: Recipe,
        rows: list[list[int]],
        advantages: Tensor,
        old: Tensor,
        stats: dict[str, Tensor],
        held: dict[str, Tensor],
    ) -> None:
        self.recipe, self.rows, self.stats, self.held = recipe, rows, stats, held
        self.advantages, self.old = advantages, old
        self.live = [t for row in rows for t in row]
        self.logprob = held["logprob"].tolist()
        self.picks = self._picks() if recipe.selection else set()

    def _picks(self) -> set[int]:
        if "selected" in self.stats:
            return {t for t in self.live if self.stats["selected"][t]}
        selection = self.recipe.selection
        assert selection is not None
        a, logprob, live = self.advantages.tolist(), self.logprob, self.live
        score = {t: logprob[t] for t in live}
        if selection.score == "covariance" and live:
            mean_a = math.fsum(a[t] for t in live) / len(live)
            mean_l = math.fsum(logprob[t] for t in live) / len(live)
            score = {t: (a[t] - mean_a) * (logprob[t] - mean_l) for t in live}
        sign = {None: 0, "negative": -1, "positive": 1}[selection.sign]
        pool = [t for t in live if not sign or a[t] * sign > 0]
        k = max(1, int(selection.fraction * len(pool)))
        if k < selection.minimum:
            return set()
        ranked = sorted(pool, key=lambda t: score[t], reverse=selection.pick == "highest")
        assert selection.pick != "random"
        picked = set(ranked[:k])
        if selection.effect == "kl_to_proxy":
            picked = {t for t in picked if logprob[t] < self._proxy(t)}
        return picked

    def _proxy(self, t: int) -> float:
        selection, old = self.recipe.selection, self.old[t].item()
        assert selection is not None
        if old < self.stats["max_logprob"][t].item() + math.log(selection.min_p):
            return -1e4
        return old - math.log(self.stats["kept_mass"][t].item())

    def selected(self, live: list[int], logprob: Tensor, loss: Tensor) -> Tensor:
        """Losses of one sequence's tokens, with those of the picked ones replaced."""
        if not self.picks.intersection(live):
            return loss
        selection, changed = self.recipe.selection, list(loss.unbind())
        assert selection is not None
        for at, t in enumerate(live):
            if t not in self.picks:
                continue
            to = self._proxy(t) if selection.effect == "kl_to_proxy" else self.old[t]
            ratio = (logprob[t] - self.old[t]).clamp(-20, 20).exp()
            kl = _kl(selection.kl, logprob[t] - to)
            swapped = -self.advantages[t] * ratio + selection.coef * kl
            changed[at] = 0.0 * loss[at] if selection.effect == "drop" else swapped
        return torch.stack(changed)

    def _change(self, t: int) -> float:
        p = min(max(math.exp(self.logprob[t]), 1e-8), 1 - 1e-8)
        old = max(math.exp(self.old[t].item()), 1e-8)
        entropy = self.stats["old_entropy"][t].item()
        return abs(self.advantages[t].item() / old * p * (1 - p) * (math.log(p) + entropy))

    def weight(self, live: list[int]) -> Tensor:
        """STEER's weights of one sequence's tokens; 1 for other methods."""
        how = self.recipe.reweighting
        if how is None:
            return torch.ones(len(live), dtype=self.old.dtype)
        every = [self._change(t) for t in self.live]
        least, most = min(every), max(every)
        found = []
        for t in live:
            change = self._change(t)
            if how.mapping == "exponential":
                w = math.exp(math.log(how.low) / max(most, how.floor) * change)
                found.append(min(max(w, how.low), 1.0))
            elif most == least:
                found.append((how.low + how.high) / 2)
            else:
                found.append(how.high - (change - least) * (how.high - how.low) / (most - least))
        return torch.tensor(found, dtype=self.old.dtype)

    def penalty(self, sequence: int, entropy: Tensor) -> Tensor:
        """EPO's penalties of one sequence's tokens, with their coefficient; a constant."""
        live, band = self.rows[sequence], self.recipe.entropy_band
        if band is None:
            return torch.zeros(len(live), dtype=self.old.dtype)
        entropy = self.held.get("entropy", entropy).detach()
        middle = entropy[self.live].mean()
        if "entropy_history" in self.stats:
            middle = self.stats["entropy_history"].mean()
        level = entropy[live]
        if band.level == "sequence":
            level = (level.sum() / (band.width or len(live))).expand(len(live))
        outside = (level <= band.low * middle) | (level >= band.high * middle)
        return outside * band.penalty * band.coef * self.stats.get("smoothing", 1.0)

    def target(self, sequences: int) -> Tensor | float:
        """SIREN's squared distance; the kept tokens are constants, the aggregate is not."""
        goal = self.recipe.entropy_target
        if goal is None:
            return 0.0
        now = self.stats["truncated_entropy"]
        then = self.held.get("truncated_entropy", now.detach())
        means = []
        for live in filter(None, self.rows):
            edge = torch.quantile(then[live], goal.quantile)
            kept = [t for t in live if then[t] > edge]
            means.append(now[kept].mean() if kept else now.new_zeros(()))
        level = torch.stack(means).sum() / sequences if means else now.new_zeros(())
        return goal.coef * (level - self.stats.get("anchor", level.detach())) ** 2


def _surrogate(
    recipe: Recipe, logprob: Tensor, old: Tensor, advantage: Tensor, held: Tensor
) -> Tensor:
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
        ratio = (logprob - held + (held - old).mean()).clamp(-20, 10).exp()
    if recipe.surrogate == "none":
        return -advantage * ratio
    clipped = ratio.clamp(1 - recipe.epsilon, 1 + high)
    if recipe.surrogate == "detached_clip":
        then = (held - old).clamp(-20, 20) if recipe.ratio == "token" else (held - old).mean()
        weight = then.clamp(-20, 20 if recipe.ratio == "token" else 10).exp()
        return -weight.clamp(1 - recipe.epsilon, 1 + high) * advantage * logprob
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if recipe.delta is not None:
        bound = torch.minimum(loss, -advantage * recipe.delta)
        loss = torch.where(advantage < 0, bound, loss)
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
