"""One generation: prompts -> rollouts -> rewards -> filter -> advantages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from eapo_fast import ops
from eapo_fast.config import EAPOConfig
from eapo_fast.engine import Sampler, SamplingParams
from eapo_fast.experts import ConsultScheduler
from eapo_fast.recipes import Recipe
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts
from eapo_fast.training.consulting import hit_by_failure, leak_flags
from eapo_fast.training.progress import Phases
from eapo_fast.training.scoring import Score, Scorer

_FLAT = 1e-6


@dataclass(frozen=True, slots=True)
class Generation:
    """Scored rollouts of one generation, ordered by prompt and sample."""

    rollouts: list[Rollout]
    scores: list[Score]
    advantages: list[float]
    """0 for rollouts that take no part."""
    trained: list[bool]
    """Whether a rollout goes into the update."""
    rows: list[int]
    """Data set row of each prompt group."""
    counters: dict[str, int]
    """What the sampler counted (`Sampler.drain_counters`)."""
    leaks: list[list[bool | None]] = field(default_factory=list)
    """For each consult of each rollout, whether its reply states the gold answer."""

    def kept(self) -> list[int]:
        """Return the indices of the rollouts that go into the update."""
        return [i for i, use in enumerate(self.trained) if use]


def generate(
    sampler: Sampler,
    scorer: Scorer,
    rows: Sequence[int],
    dataset: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    args: EAPOConfig,
    recipe: Recipe,
    *,
    protocol: ConsultProtocol | None,
    scheduler: ConsultScheduler | None,
    step: int,
    phases: Phases,
) -> Generation:
    """Sample, score (while others decode), filter and value one batch of prompt groups.

    Args:
        rows: data set rows of the groups; they name the prompts in the random keys.
        dataset: all rows.
        prompts: token ids of all rows.
        params: how to sample.
        step: optimizer step of the key and of the gate, from 1.
    """
    futures: dict[int, Future[list[Score]]] = {}

    def on_group(group: list[Rollout]) -> None:
        index = group[0].group_id
        futures[index] = scorer.submit(group, dataset[rows[index]])

    sampler.drain_counters()
    sampler.forget_prefixes()  # a resumed run has none either, and must give the same bits
    with phases.measure("rollout"), autocast(args, sampler.model.device):
        rollouts = collect_rollouts(
            sampler,
            [prompts[r] for r in rows],
            params,
            protocol=protocol,
            scheduler=scheduler,
            step=step,
            prompt_ids=list(rows),
            problems=[problem_text(dataset[r]) for r in rows],
            on_group=on_group,
        )
    with phases.measure("reward"):
        scores = [s for index in range(len(rows)) for s in futures[index].result()]
    hit = hit_by_failure(rollouts, args)
    valid = [_valid(r, s, args) and not h for r, s, h in zip(rollouts, scores, hit, strict=True)]
    golds = [dataset[rows[r.group_id]].get("answer") for r in rollouts]
    trained = _filtered(scores, valid, args.num_generations, recipe)
    return Generation(
        rollouts,
        scores,
        _advantages(rollouts, scores, valid, recipe),
        trained,
        list(rows),
        sampler.drain_counters(),
        leak_flags(rollouts, golds),
    )


def train_params(args: EAPOConfig, tokenizer: Any) -> SamplingParams:
    """Return how training samples."""
    return SamplingParams(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p or 0.0,
        n=args.num_generations,
        seed=args.seed,
        stop_token_ids=(tokenizer.eos_token_id,),
    )


def problem_text(row: Mapping[str, Any]) -> str:
    """Return the problem as the expert reads it: the last user message, or the prompt."""
    if "problem" in row:
        return str(row["problem"])
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return next((str(m["content"]) for m in reversed(prompt) if m["role"] == "user"), "")


def autocast(args: EAPOConfig, device: torch.device) -> torch.autocast:
    """Return the precision context of forwards: bfloat16 when `args` asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(args.bf16))


def generation_metrics(generation: Generation, group_size: int) -> dict[str, float]:
    """Return reward and length metrics under TRL's names."""
    rollouts, scores = generation.rollouts, generation.scores
    rewards = [s.reward for s in scores]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    spreads = [_std(g, ddof=1) for g in groups]
    lengths = [r.num_policy_tokens for r in rollouts]
    ended = [r.num_policy_tokens for r in rollouts if r.finish_reason == "stop"]
    metrics = {
        "reward": _mean(rewards),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([float(s <= _FLAT) for s in spreads]),
        "frac_trained": _mean([float(t) for t in generation.trained]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([float(r.finish_reason == "length") for r in rollouts]),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = _mean(ended)
    accuracies = [s.accuracy for s in scores if s.accuracy is not None]
    if accuracies:
        metrics["accuracy"] = _mean(accuracies)
        metrics["accuracy/undecided"] = _mean([float(s.undecided) for s in scores])
    for name in scores[0].parts:
        values = [v for s in scores if (v := s.parts[name]) is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = _mean(values)
            metrics[f"rewards/{name}/std"] = _std(values, ddof=0)
    return metrics


def _valid(rollout: Rollout, score: Score, args: EAPOConfig) -> bool:
    """Whether a rollout may enter group statistics and loss at all."""
    cut = args.mask_truncated_completions and rollout.finish_reason == "length"
    return rollout.finish_reason != "error" and not cut and math.isfinite(score.reward)


def _filtered(
    scores: Sequence[Score], valid: Sequence[bool], group_size: int, recipe: Recipe
) -> list[bool]:
    """Drop whole groups without contrast in accuracy (in reward, where there is no gold)."""
    if recipe.group_filter is None:
        return list(valid)
    trained: list[bool] = []
    for start in range(0, len(scores), group_size):
        members = range(start, start + group_size)
        values = [_contrast(scores[i]) for i in members if valid[i]]
        live = bool(values) and max(values) - min(values) > _FLAT
        trained.extend(live and valid[i] for i in members)
    return trained


def _contrast(score: Score) -> float:
    return score.reward if score.accuracy is None else score.accuracy


def _advantages(
    rollouts: Sequence[Rollout], scores: Sequence[Score], valid: Sequence[bool], recipe: Recipe
) -> list[float]:
    rewards = torch.tensor(
        [s.reward if v else 0.0 for s, v in zip(scores, valid, strict=True)], dtype=torch.float64
    )
    values = ops.group_advantages(
        rewards,
        torch.tensor([r.group_id for r in rollouts]),
        center=recipe.center,
        scale=recipe.scale,
        lengths=torch.tensor([r.num_policy_tokens for r in rollouts]),
        eps=recipe.advantage_eps,
        ddof=recipe.ddof,
        valid=torch.tensor(valid),
    )
    return [float(v) for v in values]


def _std(values: Sequence[float], *, ddof: int) -> float:
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) <= ddof:
        return math.nan
    return statistics.stdev(finite) if ddof else statistics.pstdev(finite)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
