"""One optimizer step over packed micro-batches, with global token counts."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast import ops
from eapo_fast.config import EAPOConfig
from eapo_fast.errors import NonFiniteError
from eapo_fast.recipes import Recipe
from eapo_fast.rollout import Rollout
from eapo_fast.training.optimizer import LearningRate, build_optimizer
from eapo_fast.training.packing import MicroBatch, micro_batches
from eapo_fast.training.policy import Policy
from eapo_fast.training.statistics import TokenStatistics, with_token_advantages

_DEFAULT_TOKENS = 16384

_TRL_NAMES = {
    "logp_difference_mean": "sampling/sampling_logp_difference/mean",
    "logp_difference_max": "sampling/sampling_logp_difference/max",
    "ratio_mean": "sampling/importance_sampling_ratio/mean",
    "ratio_max": "sampling/importance_sampling_ratio/max",
}


class Updater:
    """Owns optimizer and reference model; turns scored rollouts into one update.

    Args:
        model: the policy, in place.
        args: run settings.
        recipe: how rewards and log-probabilities become a loss.
        rate: learning rate over steps.
    """

    def __init__(
        self, model: PreTrainedModel, args: EAPOConfig, recipe: Recipe, rate: LearningRate
    ) -> None:
        self.model = model
        self.args = args
        self.recipe = recipe
        self.rate = rate
        self.policy = Policy(model)
        self.optimizer = build_optimizer(model, args)
        self.reference = _frozen_copy(model) if recipe.beta else None
        self.temperature = args.temperature / self.policy.logit_scale
        self.statistics = TokenStatistics(recipe, self._token_statistics)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Take what the recipe needs of the policy that sampled `rollouts`: before any update."""
        if self.statistics.of_sampling and rollouts:
            self.model.train()
            batches = self._micro_batches(rollouts, [0.0] * len(rollouts))
            self.statistics.observe(batches, rollouts)

    def step(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], step: int
    ) -> dict[str, float]:
        """Update the weights once.

        Args:
            rollouts: those that are trained; none may be empty of policy tokens.
            advantages: one per rollout.
            step: optimizer step, from 1.

        Returns:
            Metrics of the update. Without rollouts, or when loss or gradient is not finite, the
            weights stay as they are (`skipped` is 1).
        """
        metrics = {"learning_rate": self.rate.at(step)}
        if not rollouts:
            return metrics | {"loss": 0.0, "grad_norm": 0.0, "skipped": 1.0}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            metrics |= self._backward(rollouts, advantages, step)
        except NonFiniteError as error:
            warnings.warn(f"step {step} changes nothing: {error}", RuntimeWarning, stacklevel=2)
            self.optimizer.zero_grad(set_to_none=True)
            return metrics | {"loss": math.nan, "grad_norm": math.nan, "skipped": 1.0}
        applied = self._apply(metrics["loss"], step)
        if not applied["skipped"]:
            self.statistics.done(metrics)
        return metrics | applied

    @property
    def token_budget(self) -> int:
        """Most tokens of a micro-batch."""
        return self.args.micro_batch_tokens or _DEFAULT_TOKENS

    def _backward(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], step: int = 1
    ) -> dict[str, float]:
        num_tokens = sum(r.num_policy_tokens for r in rollouts)
        num_sequences = sum(r.num_policy_tokens > 0 for r in rollouts)
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        outputs: list[ops.LossOutput] = []
        batches = with_token_advantages(self._micro_batches(rollouts, advantages), self.recipe)
        stats = self.statistics.of_batch(batches, rollouts, step)
        for batch, own in zip(batches, stats, strict=True):
            with self.policy.attention(batch.row):  # type: ignore[attr-defined]
                output = self._loss(batch, own, num_tokens, num_sequences)
                output.loss.backward()
            outputs.append(replace(output, loss=output.loss.detach()))
            parts["loss"].append(output.loss.detach())
            for name, value in output.metrics.items():
                parts[_TRL_NAMES.get(name, name)].append(value)
        found = {name: _combined(name, values) for name, values in parts.items()}
        if not math.isfinite(found["loss"]):
            for output in outputs:
                output.check()
        return found

    def _micro_batches(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> list[MicroBatch]:
        found = micro_batches(
            rollouts, advantages, token_budget=self.token_budget, device=self.policy.device
        )
        return list(found)

    def _loss(
        self,
        batch: MicroBatch,
        stats: dict[str, Tensor],
        num_tokens: int,
        num_sequences: int,
    ) -> ops.LossOutput:
        return ops.linear_policy_loss(
            *self.head_inputs(self.policy, batch),
            batch.targets,
            ops.PolicyBatch(
                old_logprob=batch.old_logprobs,
                advantages=batch.advantages,
                cu_seqlens=batch.cu_targets,
                ref_logprob=self._reference_logprobs(batch),
                stats=stats,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
            ),
            self.recipe,
            bias=self.policy.bias,
            temperature=self.temperature,
            softcap=self.policy.softcap,
            banned=batch.banned,
        )

    def head_inputs(self, policy: Policy, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, H] of the trained rows only, and the head's weight [V, H].

        With `bf16` both are rounded to it, as autocast rounds the inputs of any other product.
        """
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            hidden = policy.hidden(batch.input_ids, batch.position_ids, batch.row)
        weight = policy.weight.to(torch.bfloat16) if self.args.bf16 else policy.weight
        return hidden.index_select(0, batch.rows).to(weight.dtype), weight

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self.reference is None:
            return None
        return self._token_statistics(batch, self.reference).logprob

    @torch.no_grad()
    def _token_statistics(
        self, batch: MicroBatch, policy: Policy | None = None, **settings: Any
    ) -> ops.TokenStats:
        """Return statistics of the targets under a policy; None: the one that is trained."""
        policy = policy or self.policy
        with policy.attention(batch.row):  # type: ignore[attr-defined]
            inputs = self.head_inputs(policy, batch)
        return ops.linear_token_stats(
            *inputs,
            batch.targets,
            bias=policy.bias,
            temperature=self.temperature,
            softcap=policy.softcap,
            banned=batch.banned,
            **settings,
        )

    def _apply(self, loss: float, step: int) -> dict[str, float]:
        trainable = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.args.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, limit))
        finite = torch.isfinite(torch.tensor([loss, norm])).all().item()
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate.at(step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": 0.0 if finite else 1.0}


def _frozen_copy(model: PreTrainedModel) -> Policy:
    """Return the reference: the policy's weights as they are now."""
    return Policy(copy.deepcopy(model).eval().requires_grad_(False))


def _combined(name: str, values: Sequence[Tensor]) -> float:
    """Join a metric over micro-batches: extremes by extreme, all else is already a global share."""
    stacked = torch.stack([v.detach().double() for v in values])
    if name.endswith("max"):
        return float(stacked.max())
    return float(stacked.min() if name.endswith("min") else stacked.sum())
