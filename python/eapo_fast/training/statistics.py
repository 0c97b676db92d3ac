"""What a recipe knows of tokens beyond log-probability and advantage.

Three times are kept apart. Statistics of the sampling policy are taken before the first update that
follows a generation. Comparisons over the whole mini-batch are taken before its first backward
pass, by a forward pass without gradients. What lasts from step to step (SIREN's anchor, EPO's past
entropies) is part of a checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eapo_fast import ops
from eapo_fast.recipes import Recipe
from eapo_fast.rollout import Rollout
from eapo_fast.training.packing import MicroBatch

Read = Callable[..., ops.TokenStats]
"""Returns the statistics of the targets of a micro-batch, without gradients."""
Stats = dict[str, Tensor]


class TokenStatistics:
    """Fills `PolicyBatch.stats` for a recipe.

    Args:
        recipe: whose statistics.
        read: `read(batch, **settings of ops.linear_token_stats)`.
    """

    def __init__(self, recipe: Recipe, read: Read) -> None:
        self.recipe, self.read = recipe, read
        self.anchor: float | None = None
        """Truncated entropy of the first batch (SIREN, arXiv 2509.25133)."""
        self.entropies: list[float] = []
        """Mean entropy of each step so far (EPO, arXiv 2509.22576)."""
        self._sampled: dict[int, Stats] = {}
        self._now: float | None = None

    @property
    def of_sampling(self) -> tuple[str, ...]:
        """Names of the statistics of the sampling policy that the recipe reads."""
        return tuple(n for n in self.recipe.stats if n != "truncated_entropy")

    def observe(self, batches: Sequence[MicroBatch], rollouts: Sequence[Rollout]) -> None:
        """Take the statistics of the policy that sampled `rollouts`, in the order of `batches`."""
        self._sampled = {}
        place = iter(rollouts)
        for batch in batches if self.of_sampling else ():
            for sequence in _cut(self._sampling_statistics(batch), batch.cu_targets):
                self._sampled[id(next(place))] = sequence

    def of_batch(
        self, batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], step: int
    ) -> list[Stats]:
        """Return the `stats` of each part of the mini-batch of an optimizer step."""
        stats = self._known(batches, rollouts, step)
        recipe = self.recipe
        if recipe.scope != "batch" or not (
            recipe.entropy_band or (recipe.locality == "batch-global" and len(batches) > 1)
        ):
            return stats
        found = [self._current(batch) for batch in batches]
        if recipe.entropy_band:
            self._now = float(torch.cat([x["entropy"] for x in found]).double().mean())
            usual = [*self.entropies, self._now]
            shared = torch.tensor(sum(usual) / len(usual), device=batches[0].targets.device)
            stats = [own | {"entropy_mean": shared} for own in stats]
        if recipe.locality == "batch-global":
            whole = _joined_statistics(recipe, batches, found, stats)
            stats = [own | more for own, more in zip(stats, whole, strict=True)]
        return stats

    def done(self, metrics: Mapping[str, float]) -> None:
        """Remember what lasts, after a step whose numbers were finite."""
        if self.recipe.entropy_target and self.anchor is None:
            self.anchor = metrics["truncated_entropy"]
        if self._now is not None:
            self.entropies.append(self._now)
            self._now = None

    def state_dict(self) -> dict[str, Any]:
        """Return what lasts, for a checkpoint."""
        return {"anchor": self.anchor, "entropies": self.entropies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.anchor, self.entropies = state["anchor"], list(state["entropies"])

    def _sampling_statistics(self, batch: MicroBatch) -> Stats:
        settings: dict[str, Any] = {}
        if "kept_mass" in self.of_sampling and self.recipe.selection:
            settings = {
                "extras": ("max_logprob", "kept_mass"),
                "min_p": self.recipe.selection.min_p,
            }
        found = self.read(batch, **settings)
        named = {"old_entropy": found.entropy, **found.extras}
        return {name: named[name] for name in self.of_sampling}

    def _known(
        self, batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], step: int
    ) -> list[Stats]:
        place, stats = iter(rollouts), []
        for batch in batches:
            own = [self._sampled.get(id(next(place)), {}) for _ in batch.cu_targets[1:]]
            one = {name: torch.cat([x[name] for x in own]) for name in self.of_sampling}
            device = batch.targets.device
            if self.recipe.selection and self.recipe.selection.pick == "random":
                one["step"] = torch.tensor(step, device=device)
            if self.recipe.entropy_target and self.anchor is not None:
                one["anchor"] = torch.tensor(self.anchor, device=device)
            stats.append(one)
        return stats

    def _current(self, batch: MicroBatch) -> Stats:
        target, settings = self.recipe.entropy_target, {}
        if target:
            settings = {
                "extras": ("truncated_entropy",),
                "top_p": target.top_p,
                "top_k": target.top_k,
            }
        found = self.read(batch, **settings)
        return {"logprob": found.logprob, "entropy": found.entropy, **found.extras}


def with_token_advantages(batches: Sequence[MicroBatch], recipe: Recipe) -> list[MicroBatch]:
    """Return the batches with the advantages of single tokens, where the recipe has them [N].

    Whitening runs over all policy tokens of the mini-batch (REINFORCE++, arXiv 2501.03262).
    """
    if recipe.gamma == 1 and not recipe.whiten:
        return list(batches)
    values = ops.token_advantages(
        torch.cat([b.advantages for b in batches]),
        _borders(batches),
        gamma=recipe.gamma,
        whiten=recipe.whiten,
    )
    parts = values.split([len(b.targets) for b in batches])
    return [replace(b, advantages=x) for b, x in zip(batches, parts, strict=True)]


def _joined_statistics(
    recipe: Recipe, batches: Sequence[MicroBatch], found: Sequence[Stats], stats: Sequence[Stats]
) -> list[Stats]:
    """Return `ops.policy_statistics` of all tokens, cut like the batches."""
    given = {k: torch.cat([s[k] for s in stats]) if v.ndim else v for k, v in stats[0].items()}
    if recipe.entropy_target:
        given["truncated_entropy"] = torch.cat([x["truncated_entropy"] for x in found])
    whole = ops.policy_statistics(
        torch.cat([x["logprob"] for x in found]),
        torch.cat([b.old_logprobs for b in batches]),
        torch.cat([_per_token(b) for b in batches]),
        _borders(batches),
        recipe=recipe,
        entropy=torch.cat([x["entropy"] for x in found]),
        stats=given,
    )
    sizes = [len(b.targets) for b in batches]
    parts = {k: v.split(sizes) if v.ndim else [v] * len(sizes) for k, v in whole.items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(len(sizes))]


def _per_token(batch: MicroBatch) -> Tensor:
    if len(batch.advantages) == len(batch.targets):
        return batch.advantages
    return batch.advantages.repeat_interleave(batch.cu_targets.diff())


def _borders(batches: Sequence[MicroBatch]) -> Tensor:
    """Return cu_seqlens of the targets of all batches."""
    lengths = torch.cat([b.cu_targets.diff() for b in batches])
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _cut(stats: Stats, borders: Tensor) -> list[Stats]:
    edges = borders.tolist()
    return [
        {name: values[a:b] for name, values in stats.items()} for a, b in itertools.pairwise(edges)
    ]
