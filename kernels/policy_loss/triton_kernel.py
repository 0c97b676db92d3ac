"""Policy losses in Triton: one launch, one program a sequence, no waiting for the device.

A program counts its masked-in tokens where the weights need that, averages their log-ratios where
the recipe has a ratio of the sequence, runs the token program over them and leaves their sums. A
token's advantage, weight and sequence ratio are the program's own, so that nothing is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_fast.kernels.policy_loss import triton_program
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.kernels.policy_loss.compiled import metrics_of_sums
from eapo_fast.kernels.policy_loss.metrics import metric_names
from eapo_fast.kernels.policy_loss.rows import norm_length, on_device
from eapo_fast.kernels.policy_loss.triton_math import filled
from eapo_fast.kernels.policy_loss.triton_program import ratio_terms, token_terms
from eapo_fast.recipes import Recipe

BLOCK = 512
SUMS = 10
"""Sums that a program leaves; the last two are largest values."""
SURROGATES = {"clip": 0, "detached_clip": 1, "none": 2, "reinforce": 3, "geo_mean": 2}
KLS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
AGGREGATIONS = {
    "token-mean": 0,
    "seq-mean-token-mean": 1,
    "seq-mean-token-sum": 2,
    "seq-mean-token-sum-norm": 3,
    "token-sum-norm": 4,
}


@triton.jit  # type: ignore[untyped-decorator]
def weight_of(tokens, sequences, live, norm, AGGREGATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Share of a token in the loss; see `Recipe.aggregation`."""
    if AGGREGATION == 0:
        weight = 1.0 / tokens
    elif AGGREGATION == 1:
        weight = 1.0 / (sequences * tl.maximum(live, 1.0))
    elif AGGREGATION == 2:
        weight = 1.0 / sequences
    elif AGGREGATION == 3:
        weight = 1.0 / (sequences * norm)
    else:
        weight = 1.0 / norm
    return weight


@triton.jit  # type: ignore[untyped-decorator]
def _live(mask, at, stop, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    live = at < stop
    if MASKED:
        live = live & (tl.load(mask + at, mask=live, other=0) != 0)
    return live


@triton.jit  # type: ignore[untyped-decorator]
def _advantages(advantages, sequence, at, live, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if PER_TOKEN:
        found = tl.load(advantages + at, mask=live, other=0.0)
    else:
        found = tl.load(advantages + sequence) + tl.zeros_like(at).to(tl.float32)
    return found


@triton.jit
def _geo_bounds(drift, advantage, log_low, log_high):  # type: ignore[no-untyped-def]
    """d bounded on the side that A pushes to, 0 without A, and which bound is active."""
    low = (advantage < 0.0) & (drift < log_low)
    high = (advantage > 0.0) & (drift > log_high)
    bounded = tl.where(low, log_low, tl.where(high, log_high, drift))
    return tl.where(advantage == 0.0, 0.0, bounded), low, high


@triton.jit  # type: ignore[untyped-decorator]
def evaluate(  # type: ignore[no-untyped-def]
    logprob,  # [N] fp32, as are all but cu_seqlens and mask
    old_logprob,
    advantages,  # [S], or [N] with PER_TOKEN
    cu_seqlens,  # [S + 1] int64
    mask,  # [N] bool
    ref_logprob,
    entropy,
    factor,
    counts,  # [2] tokens and sequences of the whole batch, at least 1
    a,
    b,
    token_loss,
    sums,  # [S, SUMS]
    least,
    most,
    delta,
    beta,
    entropy_coef,
    norm,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    AGGREGATION: tl.constexpr,
    SEQUENCE: tl.constexpr,  # the ratio is that of the sequence
    GEO: tl.constexpr,  # and its log-ratios are bounded first
    SHARED: tl.constexpr,  # its slope is shared out over the sequence
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    FACTOR: tl.constexpr,
    REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BETA: tl.constexpr,
    BONUS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Evaluate the tokens of one sequence."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    lane = tl.arange(0, BLOCK)
    live_count = 0.0
    mean = 0.0
    if SEQUENCE or AGGREGATION == 1:
        lives = tl.zeros([BLOCK], tl.float32)
        drifts = tl.zeros([BLOCK], tl.float32)
        for first in range(start, stop, BLOCK):
            at = first + lane
            live = _live(mask, at, stop, MASKED)
            lives += live.to(tl.float32)
            if SEQUENCE:
                drift = tl.load(logprob + at, mask=live, other=0.0)
                drift -= tl.load(old_logprob + at, mask=live, other=0.0)
                if GEO:
                    own = _advantages(advantages, sequence, at, live, PER_TOKEN)
                    drift, _, _ = _geo_bounds(drift, own, least, most)
                drifts += tl.where(live, drift, 0.0)
        live_count = tl.sum(lives, 0)
        mean = tl.sum(drifts, 0) / tl.maximum(live_count, 1.0)
    weight = weight_of(tl.load(counts), tl.load(counts + 1), live_count, norm, AGGREGATION)
    limit = 20.0
    if SEQUENCE and not GEO:
        limit = 10.0
    losses = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    duals = tl.zeros([BLOCK], tl.float32)
    largest_ratio = tl.zeros([BLOCK], tl.float32)
    largest_gap = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + lane
        inside = at < stop
        live = _live(mask, at, stop, MASKED)
        own = _advantages(advantages, sequence, at, live, PER_TOKEN)
        now = tl.load(logprob + at, mask=live, other=0.0)
        drift = now - tl.load(old_logprob + at, mask=live, other=0.0)
        gap = tl.abs(drift)
        geo_low = live & (drift != drift)
        geo_high = geo_low
        if GEO:
            _, geo_low, geo_high = _geo_bounds(drift, own, least, most)
        if SEQUENCE:
            drift = filled(drift, mean)
        ratio, moves = ratio_terms(drift, limit)
        own_factor = now
        excess = now
        own_entropy = now
        if FACTOR:
            own_factor = tl.load(factor + at, mask=live, other=0.0)
        if REFERENCE:
            excess = now - tl.load(ref_logprob + at, mask=live, other=0.0)
        if ENTROPY:
            own_entropy = tl.load(entropy + at, mask=live, other=0.0)
            entropies += own_entropy
        loss, slope, direct, kl, low, high, dual = token_terms(
            now, ratio, moves, own, own_factor, excess, own_entropy, least, most, delta, beta,
            entropy_coef, SURROGATE, KL, FACTOR, REFERENCE, BETA, BONUS,
        )  # fmt: skip
        if GEO:
            low = geo_low
            high = geo_high
        if SHARED:
            slopes += tl.where(live, slope, 0.0)
        else:
            tl.store(a + at, tl.where(live, weight * (slope + direct), 0.0), mask=inside)
        tl.store(token_loss + at, tl.where(live, loss, 0.0), mask=inside)
        if BONUS:
            tl.store(b + at, tl.where(live, -entropy_coef * weight, 0.0), mask=inside)
        losses += tl.where(live, loss, 0.0)
        ratio = tl.where(live, ratio, 0.0)
        gap = tl.where(live, gap, 0.0)
        ratios += ratio
        gaps += gap
        if REFERENCE:
            kls += tl.where(live, kl, 0.0)
        lows += (live & low).to(tl.float32)
        highs += (live & high).to(tl.float32)
        duals += (live & dual).to(tl.float32)
        largest_ratio = tl.maximum(largest_ratio, ratio)
        largest_gap = tl.maximum(largest_gap, gap)
    if SHARED:
        mean_slope = tl.sum(slopes, 0) * weight / tl.maximum(live_count, 1.0)
        for first in range(start, stop, BLOCK):
            at = first + lane
            live = _live(mask, at, stop, MASKED)
            now = tl.load(logprob + at, mask=live, other=0.0)
            share = mean_slope + tl.zeros([BLOCK], tl.float32)
            if GEO:
                own = _advantages(advantages, sequence, at, live, PER_TOKEN)
                drift = now - tl.load(old_logprob + at, mask=live, other=0.0)
                _, low, high = _geo_bounds(drift, own, least, most)
                share = tl.where(low | high | (own == 0.0), 0.0, share)
            if REFERENCE and BETA:
                excess = now - tl.load(ref_logprob + at, mask=live, other=0.0)
                _, kl_slope = triton_program.kl_terms(excess, KL)
                share += weight * beta * kl_slope
            tl.store(a + at, tl.where(live, share, 0.0), mask=at < stop)
    to = sums + sequence * SUMS
    tl.store(to, tl.sum(losses, 0) * weight)
    tl.store(to + 1, tl.sum(lows, 0))
    tl.store(to + 2, tl.sum(highs, 0))
    tl.store(to + 3, tl.sum(duals, 0))
    tl.store(to + 4, tl.sum(ratios, 0))
    tl.store(to + 5, tl.sum(gaps, 0))
    tl.store(to + 6, tl.sum(kls, 0))
    tl.store(to + 7, tl.sum(entropies, 0))
    tl.store(to + 8, tl.max(largest_ratio, 0))
    tl.store(to + 9, tl.max(largest_gap, 0))


@triton.jit  # type: ignore[untyped-decorator]
def count_live(mask, cu_seqlens, live, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Masked-in tokens of one sequence."""
    sequence = tl.program_id(0)
    stop = tl.load(cu_seqlens + sequence + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(cu_seqlens + sequence), stop, BLOCK):
        total += _live(mask, first + tl.arange(0, BLOCK), stop, True).to(tl.float32)
    tl.store(live + sequence, tl.sum(total, 0))


def policy_loss(
    logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch, recipe: Recipe
) -> LossOutput:
    """Return the detached loss of a checked batch, metrics and coefficients; float32."""
    cu_seqlens = batch.cu_seqlens.long().contiguous()
    sequences, device = len(cu_seqlens) - 1, logprob.device
    logprob, factor = _plain(logprob), (batch.stats or {}).get("weight")
    mask = None if batch.mask is None else (batch.mask != 0).contiguous()
    counts = counts_of(batch, mask, cu_seqlens)
    a, token_loss = torch.zeros_like(logprob), torch.zeros_like(logprob)
    b = torch.zeros_like(logprob) if recipe.entropy_coef else logprob.new_zeros(())
    sums = torch.zeros(sequences, SUMS, device=device)
    geo = recipe.surrogate == "geo_mean"
    if sequences:
        launch: Any = evaluate[(sequences,)]
        launch(
            logprob,
            _plain(batch.old_logprob),
            _plain(batch.advantages),
            cu_seqlens,
            logprob if mask is None else mask,
            *(logprob if x is None else _plain(x) for x in (batch.ref_logprob, entropy, factor)),
            counts,
            a,
            b,
            token_loss,
            sums,
            *bounds_of(recipe),
            float(recipe.beta),
            float(recipe.entropy_coef),
            norm_length(recipe) if recipe.aggregation.endswith("-norm") else 1.0,
            **constants_of(recipe),
            AGGREGATION=AGGREGATIONS[recipe.aggregation],
            SEQUENCE=geo or recipe.ratio != "token",
            GEO=geo,
            SHARED=geo or (recipe.ratio == "sequence" and recipe.surrogate != "detached_clip"),
            PER_TOKEN=len(batch.advantages) != sequences,
            MASKED=mask is not None,
            FACTOR=factor is not None,
            REFERENCE=batch.ref_logprob is not None,
            ENTROPY=entropy is not None,
            BLOCK=BLOCK,
            SUMS=SUMS,
            num_warps=8,
        )
    total = torch.cat([sums[:, :8].double().sum(0), _largest(sums[:, 8:]), counts[:1]])
    names = metric_names(recipe, batch.ref_logprob is not None, entropy is not None)
    return LossOutput(
        loss=total[0].float(),
        metrics=metrics_of_sums(total, names),
        a=a,
        b=b if recipe.entropy_coef else b.expand(len(a)),
        token_loss=token_loss,
    )


def constants_of(recipe: Recipe) -> dict[str, int | bool]:
    """Return what the token program is compiled for."""
    return {
        "SURROGATE": SURROGATES[recipe.surrogate],
        "KL": KLS[recipe.kl],
        "BETA": recipe.beta > 0,
        "BONUS": recipe.entropy_coef != 0,
    }


def bounds_of(recipe: Recipe) -> tuple[float, float, float]:
    """Return least, most and delta: of the ratio, or of the log-ratio for "geo_mean"."""
    center = 0.0 if recipe.surrogate == "geo_mean" else 1.0
    delta = float("inf") if recipe.delta is None else recipe.delta
    return center - recipe.epsilon, center + recipe.clip_high, delta


def counts_of(batch: PolicyBatch, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Return tokens and sequences of the whole batch [2], at least 1, without waiting."""
    given = (batch.num_tokens, batch.num_sequences)
    device = cu_seqlens.device
    if mask is not None and any(x is None for x in given):
        live = live_of(mask, cu_seqlens)
    else:
        live = cu_seqlens.diff().float()
    sums = (live.sum, (live > 0).float().sum)
    found = [
        here() if x is None else on_device(x, torch.float32, device)
        for x, here in zip(given, sums, strict=True)
    ]
    return torch.stack(found).clamp_(min=1)


def live_of(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the masked-in tokens of each sequence [S] float32."""
    live = cu_seqlens.diff().float()
    if len(live):
        launch: Any = count_live[(len(live),)]
        launch(mask, cu_seqlens, live, BLOCK=BLOCK)
    return live


def _largest(values: Tensor) -> Tensor:
    return values.amax(0) if len(values) else values.new_zeros(values.shape[1])


def _plain(values: Tensor) -> Tensor:
    return values.detach().float().contiguous()
