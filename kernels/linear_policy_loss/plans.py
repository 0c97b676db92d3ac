"""In which order rows are read and differentiated.

A slab of logits can become its own gradient once the coefficients of its rows are known: as soon as
it holds whole units, a unit being a row, a sequence or the batch, by what the recipe looks at.
That takes three matrix products of n x H x V (`slab`). A unit that no slab can hold is read first
and its logits are computed again (`prepass`): four. With a frozen head, the gradient of a hidden
state is linear in its coefficient and can be scaled afterwards (`scale`): two, as `slab` then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients, spans
from eapo_fast.kernels.linear_token_stats.finite import check_finite
from eapo_fast.kernels.policy_loss import reference as losses
from eapo_fast.kernels.policy_loss.rows import LossOutput, Rows
from eapo_fast.kernels.policy_loss.statistics import missing_statistics, resolve
from eapo_fast.recipes import Recipe

PLANS = ("auto", "slab", "prepass", "scale")

Wanted = tuple[bool, bool, bool]
"""Whether hidden, weight and bias need gradients."""


class HeadOfRows(Protocol):
    """An LM head and its rows, as `CpuHead` and `TorchHead` are."""

    chunk_size: int | None
    logprob: Tensor
    truncated: Tensor | None

    @property
    def entropy(self) -> Tensor: ...
    def slab_rows(self, *, keep: bool) -> int: ...
    def read(self, start: int, stop: int, *, keep: bool) -> None: ...
    def push(self, start: int, stop: int, slopes: Coefficients) -> None: ...
    def replay(self, start: int, stop: int, slopes: Coefficients) -> None: ...
    def scale_hidden(self, factors: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows start ... stop, which are whole units."""

    start: int
    stop: int
    fits: bool = True
    """Whether they may be kept."""


def run(head: HeadOfRows, rows: Rows, recipe: Recipe, plan: str, wanted: Wanted) -> LossOutput:
    """Return the detached loss of `recipe`, and leave its gradients in `head`."""
    if not any(wanted):
        _read(head, rows, Slab(0, len(rows.sequence)), keep=False)
        return _loss(head, rows, recipe)
    unit = unit_of(rows, recipe)
    chosen = choose_plan(plan, rows, recipe, wanted, head.slab_rows(keep=True))
    if chosen == "prepass":
        return _by_prepass(head, rows, recipe)
    if chosen == "scale":
        return _by_scale(head, rows, recipe)
    cut = list(slabs(rows, unit, head, forced=plan == "slab"))
    if len(cut) == 1 and cut[0].fits:
        _read(head, rows, cut[0], keep=True)
        found = _loss(head, rows, recipe)
        head.push(cut[0].start, cut[0].stop, _own(rows, recipe, found))
        return found
    for slab in cut:
        _read(head, rows, slab, keep=slab.fits)
        slopes = _coefficients(head, rows, recipe, unit, slab)
        add = head.push if slab.fits else head.replay
        add(slab.start, slab.stop, slopes)
    return _loss(head, rows, recipe)


def unit_of(rows: Rows, recipe: Recipe) -> str:
    """Return what coefficients depend on: "row", "sequence" or "batch".

    Batch statistics that are given (`ops.policy_statistics`) make a batch-global recipe one of rows
    or sequences.
    """
    given = {**rows.stats, **rows.shared}
    if recipe.locality == "batch-global" and missing_statistics(recipe, given):
        return "batch"
    sequence = recipe.ratio != "token" or recipe.surrogate == "geo_mean"
    return "sequence" if sequence else "row"


def choose_plan(plan: str, rows: Rows, recipe: Recipe, wanted: Wanted, most: int) -> str:
    """Return "slab", "prepass" or "scale", with slabs of at most `most` rows.

    Raises `ValueError` for a plan that cannot give these gradients.
    """
    if plan == "scale":
        check_scale(recipe, wanted)
    if plan != "auto":
        return plan
    if unit_of(rows, recipe) == "batch" and len(rows.sequence) > most:
        return "scale" if scalable(recipe, wanted) else "prepass"
    return "slab"


def scalable(recipe: Recipe, wanted: Wanted) -> bool:
    """Return whether the gradients of hidden states can be scaled once coefficients are known."""
    return wanted == (True, False, False) and not (recipe.entropy_coef or recipe.entropy_target)


def check_scale(recipe: Recipe, wanted: Wanted) -> None:
    """Raise `ValueError` unless `scalable`."""
    if scalable(recipe, wanted):
        return
    entropy_terms = recipe.entropy_coef or recipe.entropy_target
    raise ValueError(
        "plan: got 'scale', which needs a head without gradients and a recipe without entropy "
        f"terms; recipe {recipe.name!r} has {'some' if entropy_terms else 'none'}, weight and "
        f"bias have {'some' if any(wanted[1:]) else 'no'} gradients to be computed"
    )


def slabs(rows: Rows, unit: str, head: HeadOfRows, *, forced: bool) -> Iterator[Slab]:
    """Cut the rows where units end, into slabs that may be kept as far as that can be had.

    `forced`: a unit too long for a slab makes a longer one, and is not read twice.
    """
    count, most = len(rows.sequence), head.slab_rows(keep=True)
    if count == 0:
        return
    if unit == "batch":
        yield Slab(0, count)
        return
    if unit == "row":
        for start, stop in spans(count, most, even=head.chunk_size is None):
            yield Slab(start, stop)
        return
    start = stop = 0
    for length in rows.lengths.tolist():
        if stop > start and stop + length - start > most:
            yield Slab(start, stop, forced or stop - start <= most)
            start = stop
        stop += length
    yield Slab(start, stop, forced or stop - start <= most)


def _by_prepass(head: HeadOfRows, rows: Rows, recipe: Recipe) -> LossOutput:
    count = len(rows.sequence)
    _read(head, rows, Slab(0, count), keep=False)
    found = _loss(head, rows, recipe)
    head.replay(0, count, _own(rows, recipe, found))
    return found


def _by_scale(head: HeadOfRows, rows: Rows, recipe: Recipe) -> LossOutput:
    ones = torch.ones_like(head.logprob)
    for slab in slabs(rows, "row", head, forced=True):
        _read(head, rows, slab, keep=True)
        head.push(slab.start, slab.stop, Coefficients(ones[slab.start : slab.stop]))
    found = _loss(head, rows, recipe)
    head.scale_hidden(rows.gather(found.a))
    return found


def _read(head: HeadOfRows, rows: Rows, slab: Slab, *, keep: bool) -> None:
    """Read the rows of a slab; in pieces, if nothing has to be kept."""
    most = slab.stop - slab.start if keep else head.slab_rows(keep=False)
    for start, stop in spans(slab.stop - slab.start, max(1, most), even=head.chunk_size is None):
        part = slice(slab.start + start, slab.start + stop)
        head.read(part.start, part.stop, keep=keep)
        check_finite(head.entropy[part], part.start if rows.index is None else rows.index[part])


def _coefficients(
    head: HeadOfRows, rows: Rows, recipe: Recipe, unit: str, slab: Slab
) -> Coefficients:
    part = slice(slab.start, slab.stop)
    own = part_of(rows, slab.start, slab.stop)
    logprob, entropy = head.logprob[part], head.entropy[part]
    if unit == "batch":
        truncated = _truncated(head, recipe)
        truncated = None if truncated is None else truncated[part]
        own, _ = resolve(own, recipe, logprob, entropy, truncated)
    terms = losses.token_terms(own, recipe, logprob, entropy)
    return Coefficients(terms.a, terms.b, terms.c)


def part_of(rows: Rows, start: int, stop: int) -> Rows:
    """Return rows start ... stop, with the sequences that they belong to."""
    if stop - start == len(rows.sequence):
        return rows
    part = rows.part(start, stop)
    return replace(part, lengths=torch.bincount(part.sequence, minlength=len(rows.lengths)))


def _loss(head: HeadOfRows, rows: Rows, recipe: Recipe) -> LossOutput:
    truncated = _truncated(head, recipe)
    return losses.policy_loss(rows, recipe, head.logprob, head.entropy, truncated)


def _truncated(head: HeadOfRows, recipe: Recipe) -> Tensor | None:
    """Return Ht [n] where the recipe reads it; a head without rows (n is 0) never made it."""
    if recipe.entropy_target is None or head.truncated is not None:
        return head.truncated
    return head.logprob


def _own(rows: Rows, recipe: Recipe, found: LossOutput) -> Coefficients:
    return Coefficients(
        rows.gather(found.a),
        rows.gather(found.b) if recipe.entropy_coef else None,
        None if found.c is None else rows.gather(found.c),
    )
