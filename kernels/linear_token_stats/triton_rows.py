"""One program a row of logits: statistics, the token program, and the gradient in their place.

A row is read once for its statistics and once more to become its gradient
`a (onehot - p) + b (-p (ln p + H))`, and `c (-q (ln q + Ht))` on the tokens that a cut keeps, whose
border takes a few reads more (`triton_cut`). With PROGRAM, a and b come from the recipe in between,
so that one launch does all that a token-local recipe does to a slab.

The gradient may go over the logits: a program reads a block of its row before it writes one that
begins no later, also where a bfloat16 gradient takes the first half of a float32 row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.linear_token_stats.triton_cut import kept_of, truncate
from eapo_fast.kernels.linear_token_stats.triton_logits import scaled
from eapo_fast.kernels.policy_loss.triton_program import ratio_terms, token_terms
from eapo_fast.kernels.triton_functions import LOG2E

STATE = 9
"""Numbers that are kept of a row: max, mass, moment, sums of the weights squared and cubed; and of
the tokens that a cut keeps: mass, moment, border and the last id at the border (exact to 2^24)."""


LOWEST = tl.constexpr(-1e30)
"""Stands for -inf where 0 times it has to be 0."""


@triton.jit
def _ban(row, starts, ids, source):  # type: ignore[no-untyped-def]
    """Write -inf to the banned entries of a row."""
    stop = tl.load(starts + source + 1)
    for first in range(tl.load(starts + source), stop, 128):
        i = first + tl.arange(0, 128)
        banned = tl.load(ids + i, mask=i < stop, other=0)
        tl.store(row + banned, float("-inf"), mask=i < stop)
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _slope(  # type: ignore[no-untyped-def]
    x, column, vocab, target, step, bracket, slope_b, slope_c, top, log_mass, border, last,
    log_kept, level, bias, inverse, cap, BIAS: tl.constexpr, CAP: tl.constexpr,
    THIRD: tl.constexpr,
):  # fmt: skip
    """The gradient of logits `x` of a row whose statistics and coefficients are known."""
    y = scaled(x, bias, column, column < vocab, inverse, cap, BIAS, CAP)
    log_p = tl.maximum(y - top - log_mass, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(log_p * LOG2E)
    dy = tl.where(column == target, step, 0.0) - p * (bracket + slope_b * log_p)
    if THIRD:
        inside = kept_of(y, column, border, last)
        log_q = tl.where(inside, y - top - log_kept, 0.0)
        q = tl.where(inside, tl.exp2(log_q * LOG2E), 0.0)
        dy -= slope_c * q * (log_q + level)
    if CAP:
        bend = tl.where(y == float("-inf"), 0.0, y / (cap * inverse))
        dy = dy * (1.0 - bend * bend)
    return dy * inverse


@triton.jit  # type: ignore[untyped-decorator]
def run_rows(  # type: ignore[no-untyped-def]
    z,  # [C, V] logits, or with GIVEN [N, V]
    out,  # their gradients, or where they are to be; may be the memory of `z`
    rows,  # list of rows
    span,  # [2] int64: where in the list the rows of this slab start and stop
    targets,  # [N] int64
    bias,  # [V] fp32
    ban_starts,  # [N + 1] int64
    ban_ids,  # [B] int64
    state,  # [N, STATE] fp32
    logprobs,  # [N] fp32, as are the next
    entropies,
    a,
    b,
    c,
    old_logprob,
    advantages,
    weights,
    factor,
    ref_logprob,
    losses,
    aside,  # [C, ROOM] fp32 and int32: room for tokens near a border
    names,
    stride,  # of z, from row to row
    out_stride,
    vocab,
    inverse,  # 1 / temperature
    cap,
    least,
    most,
    delta,
    beta,
    entropy_coef,
    share,  # of a cut, as are the next two; see `triton_cut.truncate`
    kept_most,
    reach,
    STATISTICS: tl.constexpr,  # whether to make them; else they are in `state`
    PROGRAM: tl.constexpr,  # whether to make a and b
    GRADIENT: tl.constexpr,  # whether to make the gradient
    ZEROS: tl.constexpr,  # whether rows without a gradient have to become 0
    GIVEN: tl.constexpr,  # whether z has a row for each of N, not for each of the list
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    BANS: tl.constexpr,
    POWERS: tl.constexpr,
    CUT: tl.constexpr,
    SEARCH: tl.constexpr,
    THIRD: tl.constexpr,  # whether there is a c
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    FACTOR: tl.constexpr,
    REFERENCE: tl.constexpr,
    BETA: tl.constexpr,
    BONUS: tl.constexpr,
    STATE: tl.constexpr,
    ROOM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of a slab."""
    place = tl.program_id(0)
    at = tl.load(span) + place
    if at >= tl.load(span + 1):
        return
    source = tl.load(rows + at)
    line = place.to(tl.int64)
    if GIVEN:
        line = source
    row = z + line * stride
    changed = out + line * out_stride
    lane = tl.arange(0, BLOCK)
    if BANS:
        _ban(row, ban_starts, ban_ids, source)
    own = state + source * STATE
    if STATISTICS:
        top = float("-inf")
        bottom = float("inf")
        mass = 0.0
        moment = 0.0
        mass2 = 0.0
        mass3 = 0.0
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            column = start + lane
            there = column < vocab
            x = tl.load(row + column, mask=there, other=0.0).to(tl.float32)
            y = scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
            if CUT:
                bottom = tl.minimum(bottom, tl.min(tl.where(y > float("-inf"), y, float("inf")), 0))
            higher = tl.maximum(top, tl.max(y, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            before = tl.where(top == float("-inf"), 0.0, top - base)
            fade = tl.where(top == float("-inf"), 0.0, tl.exp2(before * LOG2E))
            distance = tl.maximum(y - base, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            weight = tl.exp2(distance * LOG2E)
            moment = fade * (moment + before * mass) + tl.sum(weight * distance, 0)
            mass = fade * mass + tl.sum(weight, 0)
            if POWERS:
                squares = weight * weight
                mass2 = fade * fade * mass2 + tl.sum(squares, 0)
                mass3 = fade * fade * fade * mass3 + tl.sum(squares * weight, 0)
            top = higher
        mass = tl.where(top == float("-inf"), float("nan"), mass)
        tl.store(own, top)
        tl.store(own + 1, mass)
        tl.store(own + 2, moment)
        if POWERS:
            tl.store(own + 3, mass2)
            tl.store(own + 4, mass3)
        if CUT:
            kept, kept_moment, border, last = truncate(
                row, aside + place.to(tl.int64) * ROOM, names + place.to(tl.int64) * ROOM, bias,
                vocab, inverse, cap, top, bottom, mass, share, kept_most, reach, BIAS, CAP, SEARCH,
                ROOM, SPAN,
            )  # fmt: skip
            tl.store(own + 5, kept)
            tl.store(own + 6, kept_moment)
            tl.store(own + 7, border)
            tl.store(own + 8, last.to(tl.float32))
    else:
        top = tl.load(own)
        mass = tl.load(own + 1)
        moment = tl.load(own + 2)
    log_mass = tl.log(mass)
    entropy = log_mass - moment / mass
    target = tl.load(targets + source)
    chosen = target + lane
    real = (lane == 0) & (chosen >= 0) & (chosen < vocab)
    hit = tl.load(row + chosen, mask=real, other=float("nan")).to(tl.float32)
    wanted = scaled(hit, bias, chosen, real, inverse, cap, BIAS, CAP)
    wanted = tl.sum(tl.where(real, wanted, tl.where(lane == 0, hit, 0.0)), 0)
    logprob = wanted - top - log_mass
    if STATISTICS:
        tl.store(logprobs + source, logprob)
        tl.store(entropies + source, entropy)
    slope_a = 0.0
    slope_b = 0.0
    slope_c = 0.0
    if PROGRAM:
        share = tl.load(weights + source)
        drift = logprob - tl.load(old_logprob + source)
        ratio, moves = ratio_terms(drift, 20.0)
        own_factor = drift
        excess = drift
        if FACTOR:
            own_factor = tl.load(factor + source)
        if REFERENCE:
            excess = logprob - tl.load(ref_logprob + source)
        loss, slope, direct, _, _, _, _ = token_terms(
            logprob, ratio, moves, tl.load(advantages + source), own_factor, excess, entropy,
            least, most, delta, beta, entropy_coef, SURROGATE, KL, FACTOR, REFERENCE, BETA, BONUS,
        )  # fmt: skip
        slope_a = share * (slope + direct)
        if BONUS:
            slope_b = -entropy_coef * share
        tl.store(a + source, slope_a)
        tl.store(losses + source, loss)
        if BONUS:
            tl.store(b + source, slope_b)
    elif GRADIENT:
        slope_a = tl.load(a + source)
        slope_b = tl.load(b + source)
        if THIRD:
            slope_c = tl.load(c + source)
    if GRADIENT:
        tl.debug_barrier()
        if (slope_a == 0.0) & (slope_b == 0.0) & (slope_c == 0.0):
            if ZEROS:
                for start in range(0, vocab, BLOCK):
                    nothing = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
                    tl.store(changed + start + lane, nothing, mask=start + lane < vocab)
            return
        step = tl.where(logprob > float("-inf"), slope_a, 0.0)
        bracket = slope_a + slope_b * entropy
        border = 0.0
        last = 0
        log_kept = 0.0
        level = 0.0
        if THIRD:
            kept = tl.load(own + 5)
            border = tl.load(own + 7)
            last = tl.load(own + 8).to(tl.int32)
            log_kept = tl.log(tl.where(kept > 0.0, kept, 1.0))
            level = log_kept - tl.load(own + 6) / tl.where(kept > 0.0, kept, 1.0)
        if out.dtype.element_ty.primitive_bitwidth < z.dtype.element_ty.primitive_bitwidth:
            ahead = tl.load(row + lane, mask=lane < vocab, other=0.0)
            for start in range(0, vocab, BLOCK):
                column = start + lane
                x = ahead.to(tl.float32)
                ahead = tl.load(row + column + BLOCK, mask=column + BLOCK < vocab, other=0.0)
                dy = _slope(
                    x, column, vocab, target, step, bracket, slope_b, slope_c, top, log_mass,
                    border, last, log_kept, level, bias, inverse, cap, BIAS, CAP, THIRD,
                )  # fmt: skip
                tl.debug_barrier()  # all have read what is written over
                tl.store(changed + column, dy.to(out.dtype.element_ty), mask=column < vocab)
        else:
            for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
                column = start + lane
                x = tl.load(row + column, mask=column < vocab, other=0.0).to(tl.float32)
                dy = _slope(
                    x, column, vocab, target, step, bracket, slope_b, slope_c, top, log_mass,
                    border, last, log_kept, level, bias, inverse, cap, BIAS, CAP, THIRD,
                )  # fmt: skip
                tl.store(changed + column, dy.to(out.dtype.element_ty), mask=column < vocab)


@triton.jit  # type: ignore[untyped-decorator]
def clear_rows(z, rows, count, stride, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write 0 to the rows behind the end of a list."""
    if tl.program_id(0) < tl.load(count):
        return
    row = z + tl.load(rows + tl.program_id(0)) * stride
    nothing = tl.zeros([BLOCK], tl.float32).to(z.dtype.element_ty)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row + column, nothing, mask=column < vocab)


@triton.jit  # type: ignore[untyped-decorator]
def scale_rows(z, factor, stride, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply all rows by a number; nothing is read where it is 1."""
    by = tl.load(factor)
    if by == 1.0:
        return
    row = z + tl.program_id(0).to(tl.int64) * stride
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < vocab, other=0.0).to(tl.float32)
        tl.store(row + column, (x * by).to(z.dtype.element_ty), mask=column < vocab)
