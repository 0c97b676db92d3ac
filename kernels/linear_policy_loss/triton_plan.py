"""The order of work on a GPU.

Masked-in rows are a list on the device, whose length the host need not know. A token-local recipe
takes it slab by slab: logits, one launch from statistics to logit gradients, products over the rows
that have one. Recipes that look at sequences take slabs of whole sequences; those that look at the
batch do so too where its statistics are given. Else one slab holds the batch, or all rows are read
first. Statistics of a batch are plain torch, over all rows with the masked-in ones in front.

Rows that are known to have no gradient before anything is computed (`LibraryHead`) are read last.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels.linear_policy_loss.plans import Wanted, check_scale, scalable
from eapo_fast.kernels.linear_policy_loss.triton_slabs import Slabs, sequence_slabs
from eapo_fast.kernels.linear_token_stats.coefficients import spans
from eapo_fast.kernels.linear_token_stats.library_head import LibraryHead
from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead
from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass, Span
from eapo_fast.kernels.policy_loss import reference, triton_kernel
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.kernels.policy_loss.rows import norm_length, trained_rows
from eapo_fast.kernels.policy_loss.statistics import missing_statistics
from eapo_fast.recipes import Recipe


def run(
    head: TritonHead, batch: PolicyBatch, recipe: Recipe, plan: str, wanted: Wanted
) -> LossOutput:
    """Return the detached loss of `recipe`, and leave its gradients in `head`."""
    most = head.slab_rows(keep=True)
    chosen = choose_plan(plan, batch, recipe, wanted, fits=head.known <= most)
    if head.known == 0:
        return loss_of(head, batch, recipe)
    if chosen == "sequences":
        return _by_sequences(head, batch, recipe, most)
    if chosen == "whole":
        return _whole(head, batch, recipe)
    program = program_of(batch, recipe) if chosen == "rows" else None
    moving = spans_of(head, 0, head.moving)
    for slab in moving:
        head.read_span(slab, program=program)
        if chosen == "rows":
            head.accumulate(slab)
        elif chosen == "scale":
            head.a.fill_(1.0)
            head.differentiate(slab)
    for slab in spans_of(head, head.moving, head.known):
        head.read_span(slab, program=program, gradient=False)
    found = loss_of(head, batch, recipe)
    if chosen == "prepass":
        head.take(found.a, found.b, found.c)
        for slab in moving:
            head.replay_span(slab)
    if chosen == "scale":
        head.scale_hidden(found.a)
    return found


def spans_of(head: TritonHead, start: int, stop: int) -> list[Span]:
    """Cut a part of the list of rows into slabs, of equal length unless that is given."""
    parts = spans(stop - start, head.slab_rows(keep=True), even=head.chunk_size is None)
    return [head.span(start + first, start + last) for first, last in parts]


def _whole(head: TritonHead, batch: PolicyBatch, recipe: Recipe) -> LossOutput:
    """Take the batch as one slab."""
    head.read_span(head.span(0, head.known))
    found = loss_of(head, batch, recipe)
    head.take(found.a, found.b, found.c)
    if head.moving:
        head.differentiate(head.span(0, head.moving))
    return found


def choose_plan(
    plan: str, batch: PolicyBatch, recipe: Recipe, wanted: Wanted, *, fits: bool
) -> str:
    """Return "read" (no gradients), "rows", "sequences", "whole", "prepass" or "scale".

    `fits`: whether a slab can hold all rows. Raises `ValueError` for a plan that cannot give these
    gradients.
    """
    if not any(wanted):
        return "read"
    if plan == "scale":
        check_scale(recipe, wanted)
    if plan in ("scale", "prepass"):
        return plan
    if recipe.locality == "token-local" and recipe.entropy_band is None:
        return "rows"
    if fits:
        return "whole"
    if not missing_statistics(recipe, batch.stats or {}):
        return "sequences"
    if plan == "slab":
        return "whole"
    return "scale" if scalable(recipe, wanted) else "prepass"


def _by_sequences(head: TritonHead, batch: PolicyBatch, recipe: Recipe, most: int) -> LossOutput:
    """Take slabs of whole sequences; those that are too long for one are read twice."""
    if isinstance(head, LibraryHead):
        slabs = counted_slabs(head, most)
    else:
        slabs = sequence_slabs(batch.cu_seqlens, batch.mask, most, len(head.targets))
    for slab in slabs.whole:
        head.read_span(slab)
        part = loss_of(head, batch, recipe)
        head.take(part.a, part.b, part.c)
        head.differentiate(slab)
    for piece in (*slabs.parts, *spans_of(head, head.moving, head.known)):
        head.read_span(piece)
    found = loss_of(head, batch, recipe)
    head.take(found.a, found.b, found.c)
    for piece in slabs.parts:
        head.replay_span(piece)
    return found


def counted_slabs(head: LibraryHead, most: int) -> Slabs:
    """Cut the rows that may have a gradient where sequences end, as far as a slab can hold them."""
    found = Slabs([], [])
    first = last = 0
    for stop in (*accumulate(head.lengths), None):
        if last > first and (stop is None or stop - first > most):
            if last - first > most:
                found.parts.extend(spans_of(head, first, last))
            else:
                found.whole.append(head.span(first, last))
            first = last
        last = last if stop is None else stop
    return found


def loss_of(head: RowPass, batch: PolicyBatch, recipe: Recipe) -> LossOutput:
    """Return the loss of rows that have been read."""
    if recipe.locality != "batch-global" and recipe.entropy_band is None:
        return triton_kernel.policy_loss(head.logprob, head.entropy, batch, recipe)
    rows = trained_rows(batch, recipe, torch.float32, (head.rows, head.count))
    own = [head.logprob, head.entropy]
    if recipe.entropy_target is not None:
        own.append(head.extra("truncated_entropy"))
    return reference.policy_loss(rows, recipe, *(rows.gather(x) for x in own))


def program_of(batch: PolicyBatch, recipe: Recipe) -> dict[str, Any]:
    """Return what `run_rows` needs for the token program: by row, for all rows, and constants."""
    cu_seqlens = batch.cu_seqlens.long().contiguous()
    sequences, count = len(cu_seqlens) - 1, len(batch.old_logprob)
    place = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], place, right=True)
    advantages = batch.advantages.float()
    factor = (batch.stats or {}).get("weight")
    least, most, delta = triton_kernel.bounds_of(recipe)
    found: dict[str, Any] = {
        "old_logprob": batch.old_logprob.float().contiguous(),
        "advantages": advantages[sequence] if len(advantages) == sequences else advantages.clone(),
        "weights": _weights(batch, recipe, cu_seqlens)[sequence],
        **triton_kernel.constants_of(recipe),
        "least": least,
        "most": most,
        "delta": delta,
        "beta": float(recipe.beta),
        "entropy_coef": float(recipe.entropy_coef),
        "PROGRAM": True,
        "FACTOR": factor is not None,
        "REFERENCE": batch.ref_logprob is not None,
    }
    optional = {"factor": factor, "ref_logprob": batch.ref_logprob}
    found |= {name: x.float().contiguous() for name, x in optional.items() if x is not None}
    return found


def _weights(batch: PolicyBatch, recipe: Recipe, cu_seqlens: Tensor) -> Tensor:
    """Return the share of a token of each sequence in the loss [S]."""
    mask = None if batch.mask is None else (batch.mask != 0).contiguous()
    tokens, sequences = triton_kernel.counts_of(batch, mask, cu_seqlens).unbind()
    lengths = cu_seqlens.diff().float()
    ones = torch.ones_like(lengths)
    if recipe.aggregation == "token-mean":
        return ones / tokens
    if recipe.aggregation == "token-sum-norm":
        return ones / norm_length(recipe)
    if recipe.aggregation == "seq-mean-token-mean":
        if mask is not None:
            lengths = triton_kernel.live_of(mask, cu_seqlens)
        return ones / (sequences * lengths.clamp(min=1))
    norm = norm_length(recipe) if recipe.aggregation.endswith("-norm") else 1.0
    return ones / (sequences * norm)
