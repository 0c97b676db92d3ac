"""What all contenders of the loss benchmark compute: a clipped policy loss behind an LM head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEADS = {"7B": (3584, 152_064), "0.5B": (896, 151_936)}
"""Hidden size and vocabulary of Qwen2.5's LM heads."""
SMALL_HEADS = {"0.5B": (16, 150)}
ROWS = (8192, 32_768)
SMALL_ROWS = (16, 32)
SEQUENCES = 8
"""Sequences of 8k tokens; four times as many of 32k."""


@dataclass
class Work:
    """Rows of equal sequences; all of them take part unless something is masked out."""

    hidden: Tensor
    """[N, H] bfloat16, a leaf."""
    weight: Tensor
    """[V, H] bfloat16, a leaf."""
    targets: Tensor
    old_logprob: Tensor
    advantages: Tensor
    """[S]"""
    mask: Tensor | None
    recipe: Any

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.targets) // len(self.advantages)

    @property
    def product(self) -> float:
        """Flop of one matrix product over all rows."""
        return 2.0 * len(self.hidden) * self.weight.numel()

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.weight.grad = None

    def slices(self, rows: int) -> Work:
        """Return the first `rows` rows (whole sequences)."""
        return Work(
            self.hidden.detach()[:rows].clone().requires_grad_(),
            self.weight,
            self.targets[:rows],
            self.old_logprob[:rows],
            self.advantages[: max(1, rows // self.length)],
            None if self.mask is None else self.mask[:rows],
            self.recipe,
        )


def build(rows: int, width: int, vocab: int, device: str, seed: int, recipe: Any) -> Work:
    """Return random rows whose ratios lie inside the clip range, so that every row counts."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    hidden = normal(rows, width).to(torch.bfloat16)
    weight = normal(vocab, width, scale=1.5 / width**0.5).to(torch.bfloat16)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    sequences = SEQUENCES * max(1, rows // ROWS[0])
    noise = normal(rows, scale=0.02)
    return Work(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        old_logprob=exact_logprobs(hidden, weight, targets) + noise,
        advantages=normal(sequences).sign() * (0.5 + normal(sequences).abs()),
        mask=None,
        recipe=recipe,
    )


@torch.no_grad()
def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Return log-probabilities from bfloat16 products in float32 softmax, chunk by chunk."""
    parts = []
    for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = (rows @ weight.T).float()
        picked = logits.gather(1, ids[:, None])[:, 0]
        parts.append(picked - logits.logsumexp(-1))
    return torch.cat(parts)


def partly_active(work: Work, seed: int) -> Work:
    """Return the work with half of the rows masked out and 30 % of the sequences without signal."""
    generator = torch.Generator(work.hidden.device).manual_seed(seed)
    mask = torch.rand(len(work.hidden), generator=generator, device=work.hidden.device) < 0.5
    advantages = work.advantages.clone()
    advantages[: round(0.3 * len(advantages))] = 0.0
    return Work(
        work.hidden, work.weight, work.targets, work.old_logprob, advantages, mask, work.recipe
    )


def ours(work: Work, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return our loss, with gradients left in the leaves of `work`; `dtype` widens everything."""
    from eapo_fast import ops

    edges = torch.arange(len(work.advantages) + 1, device=work.hidden.device) * work.length
    batch = ops.PolicyBatch(
        old_logprob=work.old_logprob.to(dtype or torch.float32),
        advantages=work.advantages.to(dtype or torch.float32),
        cu_seqlens=edges,
        mask=work.mask,
    )
    leaves = (work.hidden, work.weight)
    inputs = [x if dtype is None else x.detach().to(dtype).requires_grad_() for x in leaves]
    loss = ops.linear_policy_loss(*inputs, work.targets, batch, work.recipe, backend=backend).loss
    loss.backward()
    if dtype is not None:
        for leaf, wide in zip(leaves, inputs, strict=True):
            leaf.grad = None if wide.grad is None else wide.grad.to(leaf.dtype)
    return loss.detach()


def eager_arguments(work: Work) -> tuple[Any, ...]:
    """Return the arguments of `eager_loss`."""
    advantages = work.advantages.repeat_interleave(work.length)
    low, high = 1 - work.recipe.epsilon, 1 + work.recipe.clip_high
    return work.hidden, work.weight, work.targets, work.old_logprob, advantages, low, high


def eager_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """Return the loss in plain torch: logits of all rows, float32 softmax; advantages by row."""
    logits = (hidden @ weight.T).float()
    logprob = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return clipped_loss(logprob, old_logprob, advantages, low, high)


def clipped_loss(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """Return the mean clipped loss of rows."""
    ratio = (logprob - old_logprob).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high)).mean()


def liger_chunked(work: Work) -> Tensor:
    """Return the loss of Liger's chunked fused-linear GRPO, gradients in the leaves."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    recipe = work.recipe
    loss_fn = LigerFusedLinearGRPOLoss(
        beta=0.0,
        epsilon_low=recipe.epsilon,
        epsilon_high=recipe.clip_high,
        loss_type="bnpo",
        use_ref_model=False,
    )
    shape = (len(work.advantages), work.length)
    ones = torch.ones(shape, device=work.hidden.device)
    found = loss_fn(
        work.hidden.view(*shape, -1),
        work.weight,
        work.targets.view(shape),
        ones,
        work.advantages,
        old_per_token_logps=work.old_logprob.view(shape),
    )
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    loss.backward()
    return loss.detach()


def liger_triton(work: Work) -> Tensor:
    """Return the loss of Liger's Triton GRPO behind a plain LM head, gradients in the leaves."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    recipe, shape = work.recipe, (len(work.advantages), work.length)
    rows = work.hidden.view(*shape, -1)
    padded = torch.cat([rows, rows[:, :1].detach()], dim=1)  # it drops the last position
    found = triton_grpo_loss(
        padded @ work.weight.T,
        work.old_logprob.view(shape),
        None,
        work.targets.view(shape),
        work.advantages,
        torch.ones(shape, device=work.hidden.device, dtype=torch.int64),
        1.0,
        0.0,
        recipe.epsilon,
        recipe.clip_high,
    )
    per_token = found[0] if isinstance(found, tuple) else found
    loss: Tensor = per_token.mean()
    loss.backward()
    return loss.detach()
