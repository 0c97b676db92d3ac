"""Which rows of a batch a head has to read, and which of them can have a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.library_head import RowList
from eapo_fast.kernels.policy_loss.batch import PolicyBatch
from eapo_fast.recipes import Recipe


def row_list(batch: PolicyBatch, recipe: Recipe) -> RowList:
    """List the masked-in rows of a checked batch, those that can have a gradient in front.

    Waits for the device once, for their numbers, unless all rows are in and nothing is skipped.
    For a recipe that looks at sequences they stay together: one whose tokens have no advantage
    goes behind the others as a whole.
    """
    count, device = len(batch.old_logprob), batch.old_logprob.device
    single = recipe.locality == "token-local" and recipe.entropy_band is None
    if batch.mask is None and single and not skips(recipe):
        return _all_rows(count, device, [])
    live = torch.ones(count, dtype=torch.bool, device=device)
    if batch.mask is not None:
        live = batch.mask != 0
    moves = live & _with_advantage(batch) if skips(recipe) else live
    lengths: list[int] = []
    if single:
        known, moving = torch.stack([live.sum(), moves.sum()]).tolist()
    else:
        ends = batch.cu_seqlens.long()
        of_sequence = torch.stack([_per_sequence(x, ends) for x in (live, moves)])
        counted = list(zip(*of_sequence.tolist(), strict=True))
        lengths = [rows for rows, moved in counted if moved]
        known, moving = sum(rows for rows, _ in counted), sum(lengths)
        moves = live & _spread(of_sequence[1] > 0, ends, count)
    if known == moving == count:
        return _all_rows(count, device, lengths)
    order = (2 - live.to(torch.uint8) - moves.to(torch.uint8)).argsort(stable=True)
    return RowList(order, live.sum().view(1), known, moving, lengths, False)


def skips(recipe: Recipe) -> bool:
    """Return whether a token without advantage has no gradient, whatever the others are."""
    return (
        recipe.locality != "batch-global"
        and recipe.entropy_band is None
        and recipe.entropy_target is None
        and not recipe.beta
        and not recipe.entropy_coef
    )


def _all_rows(count: int, device: torch.device, lengths: list[int]) -> RowList:
    """List 0 ... count - 1."""
    rows = torch.arange(count, device=device)
    return RowList(rows, torch.full((1,), count, device=device), count, count, lengths, True)


def _with_advantage(batch: PolicyBatch) -> Tensor:
    """Return which rows have an advantage [N]."""
    ends, has = batch.cu_seqlens.long(), batch.advantages != 0
    if len(has) != len(ends) - 1:
        return has
    return _spread(has, ends, len(batch.old_logprob))


def _per_sequence(flags: Tensor, ends: Tensor) -> Tensor:
    """Return how many flags of each sequence are set [S]."""
    before = torch.cat([ends.new_zeros(1), flags.long().cumsum(0)])
    return before[ends].diff()


def _spread(values: Tensor, ends: Tensor, count: int) -> Tensor:
    """Return for each of `count` rows the value of its sequence."""
    return values.repeat_interleave(ends.diff(), output_size=count)
