"""One program a row of logits: statistics, the token program, and the gradient in their place.

A row is read once for its statistics and once more to become its gradient
`a (onehot - p) + b (-p (ln p + H))`. With PROGRAM, a and b come from the recipe in between, so that
one launch does all that a token-local recipe does to a slab. Logits and their gradient are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.policy_loss.triton_program import ratio_terms, token_terms

LOG2E = tl.constexpr(1.4426950408889634)
STATE = 7
"""Numbers that are kept of a row: max, mass, moment, sums of the weights squared and cubed, and
mass and moment of the tokens within `reach` of the largest."""


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent: an odd polynomial near 0, where the other form cancels."""
    size = tl.abs(x)
    square = x * x
    series = -0.00611316 * square + 0.02101005
    series = series * square - 0.05385406
    series = series * square + 0.13332794
    series = series * square - 0.33333329
    near = x + x * square * series
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(x, bias, column, there, inverse, cap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = cap(x + bias) / temperature; -inf where it is banned or past the end."""
    if BIAS:
        x += tl.load(bias + column, mask=there, other=0.0)
    if CAP:
        x = tl.where(x == float("-inf"), x, cap * _tanh(x / cap))
    return tl.where(there, x * inverse, float("-inf"))


@triton.jit
def _ban(row, starts, ids, source):  # type: ignore[no-untyped-def]
    """Write -inf to the banned entries of a row."""
    stop = tl.load(starts + source + 1)
    for first in range(tl.load(starts + source), stop, 128):
        i = first + tl.arange(0, 128)
        banned = tl.load(ids + i, mask=i < stop, other=0)
        tl.store(row + banned, float("-inf"), mask=i < stop)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def run_rows(  # type: ignore[no-untyped-def]
    z,  # [C, V] fp32
    rows,  # list of rows; those of this slab start at `first`
    count,  # [1] int64, rows in the list
    targets,  # [N] int64
    bias,  # [V] fp32
    ban_starts,  # [N + 1] int64
    ban_ids,  # [B] int64
    state,  # [N, STATE] fp32
    logprobs,  # [N] fp32, as are the next
    entropies,
    a,
    b,
    old_logprob,
    advantages,
    weights,
    factor,
    ref_logprob,
    losses,
    first,
    vocab,
    inverse,  # 1 / temperature
    cap,
    least,
    most,
    delta,
    beta,
    entropy_coef,
    reach,  # ln of the least share of the largest p that is kept
    STATISTICS: tl.constexpr,  # whether to make them; else they are in `state`
    PROGRAM: tl.constexpr,  # whether to make a and b
    GRADIENT: tl.constexpr,  # whether to make the gradient
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    BANS: tl.constexpr,
    POWERS: tl.constexpr,
    CUT: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    FACTOR: tl.constexpr,
    REFERENCE: tl.constexpr,
    BETA: tl.constexpr,
    BONUS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a slab."""
    place = tl.program_id(0)
    if first + place >= tl.load(count):
        return
    source = tl.load(rows + first + place)
    row = z + place.to(tl.int64) * vocab
    lane = tl.arange(0, BLOCK)
    if BANS:
        _ban(row, ban_starts, ban_ids, source)
    own = state + source * STATE
    if STATISTICS:
        top = float("-inf")
        mass = 0.0
        moment = 0.0
        mass2 = 0.0
        mass3 = 0.0
        wrong = 0
        for start in range(0, vocab, BLOCK):
            column = start + lane
            there = column < vocab
            x = tl.load(row + column, mask=there, other=0.0)
            y = _scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
            bad = (y != y) | (y == float("inf"))
            wrong += tl.sum(bad.to(tl.int32), 0)
            y = tl.where(bad, float("-inf"), y)
            higher = tl.maximum(top, tl.max(y, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            before = tl.where(top == float("-inf"), 0.0, top - base)
            fade = tl.where(top == float("-inf"), 0.0, tl.exp2(before * LOG2E))
            distance = tl.where(y == float("-inf"), 0.0, y - base)
            weight = tl.where(y == float("-inf"), 0.0, tl.exp2(distance * LOG2E))
            moment = fade * (moment + before * mass) + tl.sum(weight * distance, 0)
            mass = fade * mass + tl.sum(weight, 0)
            if POWERS:
                squares = weight * weight
                mass2 = fade * fade * mass2 + tl.sum(squares, 0)
                mass3 = fade * fade * fade * mass3 + tl.sum(squares * weight, 0)
            top = higher
        mass = tl.where((wrong > 0) | (top == float("-inf")), float("nan"), mass)
        tl.store(own, top)
        tl.store(own + 1, mass)
        tl.store(own + 2, moment)
        if POWERS:
            tl.store(own + 3, mass2)
            tl.store(own + 4, mass3)
        if CUT:
            kept = 0.0
            kept_moment = 0.0
            for start in range(0, vocab, BLOCK):
                column = start + lane
                there = column < vocab
                x = tl.load(row + column, mask=there, other=0.0)
                y = _scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
                distance = tl.where(y == float("-inf"), 0.0, y - top)
                inside = (y > float("-inf")) & (distance >= reach)
                weight = tl.where(inside, tl.exp2(distance * LOG2E), 0.0)
                kept += tl.sum(weight, 0)
                kept_moment += tl.sum(tl.where(inside, weight * distance, 0.0), 0)
            tl.store(own + 5, kept)
            tl.store(own + 6, kept_moment)
    else:
        top = tl.load(own)
        mass = tl.load(own + 1)
        moment = tl.load(own + 2)
    log_mass = tl.log(mass)
    entropy = log_mass - moment / mass
    target = tl.load(targets + source)
    hit = tl.load(row + target + lane, mask=lane == 0, other=0.0)
    wanted = _scaled(hit, bias, target + lane, lane == 0, inverse, cap, BIAS, CAP)
    logprob = tl.max(wanted, 0) - top - log_mass
    if STATISTICS:
        tl.store(logprobs + source, logprob)
        tl.store(entropies + source, entropy)
    slope_a = 0.0
    slope_b = 0.0
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
    if GRADIENT:
        if (slope_a == 0.0) & (slope_b == 0.0):
            return
        tl.debug_barrier()
        step = tl.where(logprob > float("-inf"), slope_a, 0.0)
        bracket = slope_a + slope_b * entropy
        for start in range(0, vocab, BLOCK):
            column = start + lane
            there = column < vocab
            x = tl.load(row + column, mask=there, other=0.0)
            y = _scaled(x, bias, column, there, inverse, cap, BIAS, CAP)
            log_p = tl.where(y == float("-inf"), 0.0, y - top - log_mass)
            p = tl.where(y == float("-inf"), 0.0, tl.exp2(log_p * LOG2E))
            dy = tl.where(column == target, step, 0.0) - p * (bracket + slope_b * log_p)
            if CAP:
                bend = tl.where(y == float("-inf"), 0.0, y / (cap * inverse))
                dy = dy * (1.0 - bend * bend)
            tl.store(row + column, dy * inverse, mask=there)
