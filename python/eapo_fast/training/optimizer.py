"""AdamW and its learning rate; the rate is a pure function of the step, so resuming is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from eapo_fast.config import EAPOConfig

_EAPO_WARMUP = 20


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Linear warm-up, then constant, linear to 0, or cosine to 0."""

    peak: float
    kind: str
    warmup: int
    """Steps."""
    total: int
    """Steps of the whole run."""

    def at(self, step: int) -> float:
        """Return the rate of optimizer step `step` (from 1)."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant":
            return self.peak
        done = (step - 1 - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "linear":
            return self.peak * (1.0 - done)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))


def learning_rate(args: EAPOConfig, total_steps: int) -> LearningRate:
    """Return the schedule that `args` asks for; defaults depend on the recipe (spec 12, DAPO)."""
    eapo = args.recipe_name == "eapo"
    warmup = args.warmup_steps if args.warmup_steps is not None else (_EAPO_WARMUP if eapo else 0)
    steps = math.ceil(warmup * total_steps) if 0 < warmup < 1 else int(warmup)
    kind = args.lr_scheduler_type or ("constant" if eapo else "linear")
    return LearningRate(args.learning_rate, kind, min(steps, total_steps), total_steps)


def build_optimizer(model: nn.Module, args: EAPOConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; vectors are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=args.optim == "adamw_torch_fused",
    )
