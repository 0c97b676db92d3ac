"""Token statistics of an LM head whose vocabulary is spread over the ranks of a process group.

Every rank has all hidden states and some rows of the weight. Forward it reads its shard, and the
ranks exchange seven numbers a token; backward it makes the gradient of its shard from the numbers
of the whole row, and hidden gradients are summed over the ranks. No logits are exchanged.

This is the point to extend for other backends: a head takes part if its state can be merged
(`merged`) and if its `replay` leaves a target alone that lies behind its last column. The CPU head
does both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function

from eapo_fast import _core
from eapo_fast.kernels.checks import FLOATS, INTEGERS, check_tensor
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.linear_token_stats import TokenStats, check_head
from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients, spans
from eapo_fast.kernels.linear_token_stats.cpu import CpuHead
from eapo_fast.kernels.linear_token_stats.finite import check_finite
from eapo_fast.kernels.native import cpu_refusal

__all__ = ["merged", "sharded_token_stats"]


def sharded_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
) -> TokenStats:
    """Return what `linear_token_stats` would for the weights of all ranks, on every rank.

    Differentiable once in `hidden`, `weight` and `bias` through both outputs. The loss is taken to
    be the same on every rank: the gradient of `hidden` is the whole one everywhere, those of
    `weight` and `bias` are of the shard. With `ops.policy_loss` behind it, that is a policy loss
    over a tensor-parallel head, in four matrix products.

    Args:
        hidden: [N, H] float32 or bfloat16, the same on every rank.
        weight: [V_r, H], rows start ... start + V_r of the head; shards may differ in size.
        targets: [N] ids in the whole vocabulary, the same on every rank.
        start: first id of this rank's shard.
        group: the ranks; None: all of them. All must call.
        bias: [V_r], of the shard.
        temperature, softcap, chunk_size: as in `linear_token_stats`.
        banned: (rows, ids) in the whole vocabulary.

    Raises `ValueError` for arguments that do not fit, and for a target that no shard or more than
    one has; `NonFiniteError` for a token whose logits are not finite on any rank.
    """
    check_tensor("hidden", hidden, ["N", "H"], FLOATS)
    check_tensor("targets", targets, [len(hidden)], INTEGERS, hidden.device)
    check_head(hidden, weight, targets, bias, temperature, softcap, None, banned, chunk_size)
    reason = cpu_refusal(hidden)
    if reason is not None:
        raise ValueError(f"hidden: sharded statistics run on the CPU: {reason}")
    settings = {
        "bias": None if bias is None else bias.detach(),
        "temperature": float(temperature),
        "softcap": softcap,
        "vocab_size": len(weight),
        "banned": _own(banned, start, len(weight)),
        "chunk_size": chunk_size,
    }
    found: tuple[Tensor, Tensor] = _Sharded.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets.long() - start, settings, group
    )
    return TokenStats(logprob=found[0], entropy=found[1])


def merged(states: Tensor) -> Tensor:
    """Return the state [N, 6] of whole rows from those of their shards [ranks, N, 6].

    A row's numbers are those of `LossRow` (csrc/cpu/loss.h); a shard without the target has 0.
    """
    top, mass, moment, target, mass2, mass3 = states.unbind(2)
    highest = top.amax(0)
    gap = torch.where(top > -torch.inf, top - highest, 0.0)
    fade = torch.where(top > -torch.inf, gap.exp(), 0.0)
    mass_now = torch.where(mass.isnan(), mass, fade * mass)  # a NaN must not be faded out
    sums = [
        mass_now.sum(0),
        (fade * (moment + gap * mass)).sum(0),
        target.sum(0),
        (fade.square() * mass2).sum(0),
        (fade.pow(3) * mass3).sum(0),
    ]
    return torch.stack([highest, *sums], 1)


class _Sharded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        owned = (targets >= 0) & (targets < len(weight))
        local = torch.where(owned, targets, len(weight))
        head = CpuHead(hidden, weight, local, **settings)
        even = settings["chunk_size"] is None
        for start, stop in spans(len(hidden), head.slab_rows(keep=False), even=even):
            head.read(start, stop, keep=False)
        head.close()
        state = _exchange(head.state, owned, group)
        top, mass, moment, target, *_ = state.unbind(1)
        entropy = (mass.log() - moment / mass).float()
        check_finite(entropy, 0)
        ctx.save_for_backward(hidden, weight, bias, local, state)
        ctx.settings, ctx.group = settings, group
        return (target - top - mass.log()).float(), entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, state = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        settings = {**ctx.settings, "bias": bias}
        head = CpuHead(hidden, weight, targets, **settings, wanted=wanted, state=state)
        head.replay(0, len(hidden), Coefficients(a, b))
        of_hidden, of_weight, of_bias = head.gradients()
        head.close()
        if of_hidden is not None:
            total = of_hidden.float()
            dist.all_reduce(total, group=ctx.group)
            of_hidden = total.to(hidden.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


def _exchange(state: Tensor, owned: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the merged state of all ranks; each target must have one owner, else `ValueError`."""
    own = torch.cat([state, owned[:, None].to(state.dtype)], 1)
    own[~owned, 3] = 0.0
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    states = torch.stack(every)
    owners = states[:, :, _core.LOSS_STATE].sum(0)
    if bool((owners != 1).any()):
        at = int((owners != 1).nonzero()[0])
        raise ValueError(
            f"targets: that of token {at} lies in {int(owners[at])} shards, it must lie in one; "
            "look at start and at the shards' sizes"
        )
    return merged(states[:, :, : _core.LOSS_STATE])


def _own(
    banned: tuple[Tensor, Tensor] | None, start: int, size: int
) -> tuple[Tensor, Tensor] | None:
    if banned is None:
        return None
    rows, ids = banned[0].long(), banned[1].long() - start
    here = (ids >= 0) & (ids < size)
    return rows[here], ids[here]
