"""Parts of the sampler's Triton kernels: a row's tiles, its smallest kept logit, its token."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr((1 << 31) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(  # type: ignore[no-untyped-def]
    row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK: tl.constexpr
):
    """Logits `start` .. `start + BLOCK - 1` of a row in float32; -inf past its end or banned."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    for first in range(0, num_bans, 128):
        i = first + tl.arange(0, 128)
        whose = tl.load(ban_samples + i, mask=i < num_bans, other=-1)
        ban = tl.load(ban_ids + i, mask=i < num_bans, other=-1)
        here = (whose == sample) & (ban >= start) & (ban < start + BLOCK)
        left = tl.where(here, ban, FAR)
        nearest = tl.min(left, 0)
        while nearest < FAR:
            x = tl.where(token == nearest, float("-inf"), x)
            left = tl.where(left == nearest, FAR, left)
            nearest = tl.min(left, 0)
    return x


@triton.jit
def inverse_of(temperature):  # type: ignore[no-untyped-def]
    """1 / temperature, 1 where it is 0 (greedy)."""
    return tl.minimum(1.0 / tl.where(temperature == 0.0, 1.0, temperature), 1e30)


@triton.jit
def key_of(x):  # type: ignore[no-untyped-def]
    """int32 in the order of the floats; one key for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _reached(sums, wanted, key, high):  # type: ignore[no-untyped-def]
    return ((tl.sum(sums, 0) >= wanted) & (key < high)).to(tl.int64)


@triton.jit
def _border(key):  # type: ignore[no-untyped-def]
    return tl.minimum(key, 0x7FFFFFFF).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def last_key(  # type: ignore[no-untyped-def]
    row,
    vocab,
    sample,
    ban_samples,
    ban_ids,
    num_bans,
    low,
    high,
    wanted,
    top,
    scale,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest key t in [low, high) such that the entries >= t weigh `wanted`, which `low` does.

    An entry weighs 1, or with MASS its share relative to the largest.
    """
    while high - low > 1:
        step = (high - low + 7) // 8
        s1 = tl.zeros([BLOCK], tl.float32)
        s2 = tl.zeros([BLOCK], tl.float32)
        s3 = tl.zeros([BLOCK], tl.float32)
        s4 = tl.zeros([BLOCK], tl.float32)
        s5 = tl.zeros([BLOCK], tl.float32)
        s6 = tl.zeros([BLOCK], tl.float32)
        s7 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            x = load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
            key = key_of(x)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if MASS:
                weight = tl.exp2((x - top) * scale)
            s1 += tl.where(key >= _border(low + step), weight, 0.0)
            s2 += tl.where(key >= _border(low + 2 * step), weight, 0.0)
            s3 += tl.where(key >= _border(low + 3 * step), weight, 0.0)
            s4 += tl.where(key >= _border(low + 4 * step), weight, 0.0)
            s5 += tl.where(key >= _border(low + 5 * step), weight, 0.0)
            s6 += tl.where(key >= _border(low + 6 * step), weight, 0.0)
            s7 += tl.where(key >= _border(low + 7 * step), weight, 0.0)
        passed = _reached(s1, wanted, low + step, high)
        passed += _reached(s2, wanted, low + 2 * step, high)
        passed += _reached(s3, wanted, low + 3 * step, high)
        passed += _reached(s4, wanted, low + 4 * step, high)
        passed += _reached(s5, wanted, low + 5 * step, high)
        passed += _reached(s6, wanted, low + 6 * step, high)
        passed += _reached(s7, wanted, low + 7 * step, high)
        low = low + passed * step
        high = tl.minimum(high, low + step)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def shares_of(  # type: ignore[no-untyped-def]
    row,
    vocab,
    sample,
    ban_samples,
    ban_ids,
    num_bans,
    least,
    top,
    scale,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights [TILES] of the tiles' entries with keys of at least `least`, float64."""
    tile = tl.arange(0, TILES)
    shares = tl.zeros([TILES], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
        weight = tl.where(key_of(x) >= least, tl.exp2((x - top) * scale), 0.0)
        shares = tl.where(tile == start // BLOCK, tl.sum(weight, 0), shares)
    return shares.to(tl.float64)


@triton.jit
def pick(weights, target, names):  # type: ignore[no-untyped-def]
    """First of `names` whose cumulative weight exceeds the target; rounding never passes the last.

    Also returns the weight before it.
    """
    passed = (tl.cumsum(weights, 0) > target) & (weights > 0.0)
    chosen = tl.min(tl.where(passed, names, FAR), 0)
    last = tl.max(tl.where(weights > 0.0, names, -1), 0)
    chosen = tl.minimum(chosen, last)
    return chosen, tl.sum(tl.where(names < chosen, weights, 0.0), 0)
