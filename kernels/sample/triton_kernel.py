"""The sampler in Triton: one pass over the logits by many programs, then one program a sample.

`tile_sums` leaves the largest logit and the sum of weights of every tile of the vocabulary; `draw`
finds the tile in which the cumulative weight passes the uniform number, then the token in it. A
truncated row is read again, once for each step of the search for its smallest kept logit: an
eight-way bisection over the bits of float32, exact, which keeps equals together. Sums over tiles
are float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Vocabulary entries of a tile."""

_LOG2E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr((1 << 31) - 1)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
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
        left = tl.where(here, ban, _FAR)
        nearest = tl.min(left, 0)
        while nearest < _FAR:
            x = tl.where(token == nearest, float("-inf"), x)
            left = tl.where(left == nearest, _FAR, left)
            nearest = tl.min(left, 0)
    return x


@triton.jit
def _inverse(temperature):  # type: ignore[no-untyped-def]
    """1 / temperature, 1 where it is 0 (greedy)."""
    return tl.minimum(1.0 / tl.where(temperature == 0.0, 1.0, temperature), 1e30)


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """int32 in the order of the floats; one key for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _reached(sums, wanted, key, high):  # type: ignore[no-untyped-def]
    return ((tl.sum(sums, 0) >= wanted) & (key < high)).to(tl.int64)


@triton.jit
def _border(key):  # type: ignore[no-untyped-def]
    return tl.minimum(key, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _last_key(  # type: ignore[no-untyped-def]
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
            x = _load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
            key = _key(x)
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


@triton.jit(do_not_specialize=["num_rows", "num_bans"])  # type: ignore[untyped-decorator]
def tile_sums(  # type: ignore[no-untyped-def]
    logits,  # [num_rows, vocab], rows row_stride apart
    rows,  # [N] int32
    temperatures,  # [N] fp32
    ban_samples,  # [num_bans] int32
    ban_ids,  # [num_bans] int32
    tops,  # [N, tiles] fp32, +inf where the tile holds NaN or +inf
    sums,  # [N, tiles] fp32, of exp((x - top) / temperature)
    num_rows,
    row_stride,
    vocab,
    num_bans,
    BLOCK: tl.constexpr,
):
    """Largest logit and sum of weights of one tile for one sample."""
    sample = tl.program_id(0)
    source = tl.load(rows + sample)
    there = (source >= 0) & (source < num_rows)
    row = logits + tl.where(there, source, 0).to(tl.int64) * row_stride
    start = tl.program_id(1) * BLOCK
    x = _load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
    wrong = (x != x) | (x == float("inf"))
    top = tl.max(tl.where(wrong, float("-inf"), x), 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    scale = _inverse(tl.load(temperatures + sample)) * _LOG2E
    total = tl.sum(tl.where(wrong, 0.0, tl.exp2((x - base) * scale)), 0)
    broken = (tl.max(wrong.to(tl.int32), 0) > 0) | (there == 0)
    at = sample * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + at, tl.where(broken, float("inf"), top))
    tl.store(sums + at, total)


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
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
        x = _load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
        weight = tl.where(_key(x) >= least, tl.exp2((x - top) * scale), 0.0)
        shares = tl.where(tile == start // BLOCK, tl.sum(weight, 0), shares)
    return shares.to(tl.float64)


@triton.jit
def _pick(weights, target, names):  # type: ignore[no-untyped-def]
    """First of `names` whose cumulative weight exceeds the target; rounding never passes the last.

    Also returns the weight before it.
    """
    passed = (tl.cumsum(weights, 0) > target) & (weights > 0.0)
    chosen = tl.min(tl.where(passed, names, _FAR), 0)
    last = tl.max(tl.where(weights > 0.0, names, -1), 0)
    chosen = tl.minimum(chosen, last)
    return chosen, tl.sum(tl.where(names < chosen, weights, 0.0), 0)


@triton.jit(do_not_specialize=["num_bans"])  # type: ignore[untyped-decorator]
def draw(  # type: ignore[no-untyped-def]
    logits,
    rows,
    uniforms,  # [N] fp32
    temperatures,
    top_ks,  # [N] int32
    top_ps,  # [N] fp32
    min_ps,  # [N] fp32
    ban_samples,
    ban_ids,
    tops,
    sums,
    out_tokens,  # [N] int64
    out_logprobs,  # [N] fp32
    out_kept,  # [N] fp32
    row_stride,
    vocab,
    num_bans,
    tiles,
    TILES: tl.constexpr,  # >= tiles
    BLOCK: tl.constexpr,
):
    """Draw one sample's token from the sums of its tiles."""
    sample = tl.program_id(0)
    tile = tl.arange(0, TILES)
    at = sample * tiles + tile
    tile_top = tl.load(tops + at, mask=tile < tiles, other=float("-inf"))
    top = tl.max(tile_top, 0)
    if (top == float("inf")) | (top == float("-inf")):
        tl.store(out_tokens + sample, -1)
        tl.store(out_logprobs + sample, float("nan"))
        tl.store(out_kept + sample, float("nan"))
        return
    row = logits + tl.load(rows + sample).to(tl.int64) * row_stride
    temperature = tl.load(temperatures + sample)
    inverse = _inverse(temperature)
    scale = inverse * _LOG2E
    tile_sum = tl.load(sums + at, mask=tile < tiles, other=0.0)
    shares = (tile_sum * tl.exp2((tile_top - top) * scale)).to(tl.float64)
    full = tl.sum(shares, 0)
    top_k = tl.load(top_ks + sample)
    top_p = tl.load(top_ps + sample)
    min_p = tl.load(min_ps + sample)
    by_count = (top_k > 0) & (top_k < vocab) & (temperature != 0.0)
    by_mass = (top_p < 1.0) & (temperature != 0.0)
    by_ratio = (min_p > 0.0) & (temperature != 0.0)
    least = _key(tl.minimum(top, float("-inf")))
    high = _key(top).to(tl.int64) + 1
    if by_count:
        least = _last_key(
            row,
            vocab,
            sample,
            ban_samples,
            ban_ids,
            num_bans,
            least.to(tl.int64),
            high,
            top_k.to(tl.float32),
            top,
            scale,
            False,
            BLOCK,
        ).to(tl.int32)
    if by_mass:
        kept = _shares(
            row, vocab, sample, ban_samples, ban_ids, num_bans, least, top, scale, TILES, BLOCK
        )
        least = _last_key(
            row,
            vocab,
            sample,
            ban_samples,
            ban_ids,
            num_bans,
            least.to(tl.int64),
            high,
            (top_p.to(tl.float64) * tl.sum(kept, 0)).to(tl.float32),
            top,
            scale,
            True,
            BLOCK,
        ).to(tl.int32)
    if by_ratio:
        cut = tl.minimum(top, top + tl.log(min_p) / inverse)
        least = tl.maximum(least, _key(cut))
    if by_count | by_mass | by_ratio:
        shares = _shares(
            row, vocab, sample, ban_samples, ban_ids, num_bans, least, top, scale, TILES, BLOCK
        )
    kept = tl.sum(shares, 0)
    target = tl.load(uniforms + sample).to(tl.float64) * kept
    chosen, before = _pick(shares, target, tile)
    if temperature == 0.0:
        chosen = tl.min(tl.where(tile_top == top, tile, _FAR), 0)
    start = chosen * BLOCK
    x = _load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
    weight = tl.where(_key(x) >= least, tl.exp2((x - top) * scale), 0.0)
    names = start + tl.arange(0, BLOCK)
    token, _ = _pick(weight.to(tl.float64), target - before, names)
    if temperature == 0.0:
        token = tl.min(tl.where(x == top, names, _FAR), 0)
    logit = tl.sum(tl.where(names == token, x, 0.0), 0)
    logprob = (logit - top).to(tl.float64) * inverse - tl.log(kept)
    tl.store(out_tokens + sample, token.to(tl.int64))
    tl.store(out_logprobs + sample, logprob.to(tl.float32))
    tl.store(out_kept + sample, (kept / full).to(tl.float32))


def sample(
    logits: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    ban_samples: Tensor,
    ban_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, log-probabilities and kept masses [N]; shapes as in the public function."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    count, vocab, device = len(rows), logits.shape[1], logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs, kept = (torch.empty(count, device=device) for _ in range(2))
    if count == 0:
        return tokens, logprobs, kept
    tiles = triton.cdiv(vocab, BLOCK)
    tops, sums = (torch.empty(count, tiles, device=device) for _ in range(2))
    launch: Any = tile_sums[(count, tiles)]
    launch(
        logits,
        rows,
        temperatures,
        ban_samples,
        ban_ids,
        tops,
        sums,
        len(logits),
        logits.stride(0),
        vocab,
        len(ban_ids),
        BLOCK=BLOCK,
        num_warps=4,
    )
    launch = draw[(count,)]
    launch(
        logits,
        rows,
        uniforms,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        ban_samples,
        ban_ids,
        tops,
        sums,
        tokens,
        logprobs,
        kept,
        logits.stride(0),
        vocab,
        len(ban_ids),
        tiles,
        TILES=triton.next_power_of_2(tiles),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return tokens, logprobs, kept
