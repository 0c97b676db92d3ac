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

from eapo_fast.kernels.checks import check_tensor
from eapo_fast.kernels.native import GPU_STORAGE
from eapo_fast.kernels.sample.triton_parts import (
    FAR,
    LOG2E,
    inverse_of,
    key_of,
    last_key,
    load_tile,
    pick,
    shares_of,
)

BLOCK = 2048
"""Vocabulary entries of a tile."""


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
    x = load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
    wrong = (x != x) | (x == float("inf"))
    top = tl.max(tl.where(wrong, float("-inf"), x), 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    scale = inverse_of(tl.load(temperatures + sample)) * LOG2E
    total = tl.sum(tl.where(wrong, 0.0, tl.exp2((x - base) * scale)), 0)
    broken = (tl.max(wrong.to(tl.int32), 0) > 0) | (there == 0)
    at = sample * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + at, tl.where(broken, float("inf"), top))
    tl.store(sums + at, total)


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
    inverse = inverse_of(temperature)
    scale = inverse * LOG2E
    tile_sum = tl.load(sums + at, mask=tile < tiles, other=0.0)
    shares = (tile_sum * tl.exp2((tile_top - top) * scale)).to(tl.float64)
    full = tl.sum(shares, 0)
    top_k = tl.load(top_ks + sample)
    top_p = tl.load(top_ps + sample)
    min_p = tl.load(min_ps + sample)
    by_count = (top_k > 0) & (top_k < vocab) & (temperature != 0.0)
    by_mass = (top_p < 1.0) & (temperature != 0.0)
    by_ratio = (min_p > 0.0) & (temperature != 0.0)
    least = key_of(tl.minimum(top, float("-inf")))
    high = key_of(top).to(tl.int64) + 1
    if by_count:
        least = last_key(
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
        kept = shares_of(
            row, vocab, sample, ban_samples, ban_ids, num_bans, least, top, scale, TILES, BLOCK
        )
        least = last_key(
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
        least = tl.maximum(least, key_of(cut))
    if by_count | by_mass | by_ratio:
        shares = shares_of(
            row, vocab, sample, ban_samples, ban_ids, num_bans, least, top, scale, TILES, BLOCK
        )
    kept = tl.sum(shares, 0)
    target = tl.load(uniforms + sample).to(tl.float64) * kept
    chosen, before = pick(shares, target, tile)
    if temperature == 0.0:
        chosen = tl.min(tl.where(tile_top == top, tile, FAR), 0)
    start = chosen * BLOCK
    x = load_tile(row, start, vocab, sample, ban_samples, ban_ids, num_bans, BLOCK)
    weight = tl.where(key_of(x) >= least, tl.exp2((x - top) * scale), 0.0)
    names = start + tl.arange(0, BLOCK)
    token, _ = pick(weight.to(tl.float64), target - before, names)
    if temperature == 0.0:
        token = tl.min(tl.where(x == top, names, FAR), 0)
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
    _check(logits, rows, uniforms, temperatures, top_ks, top_ps, min_ps, ban_samples, ban_ids)
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


def _check(logits: Tensor, rows: Tensor, *settings: Tensor) -> None:
    """Raise `ValueError` for shapes, dtypes and devices that do not fit; values are not read."""
    uniforms, temperatures, top_ks, top_ps, min_ps, ban_samples, ban_ids = settings
    device, integers = logits.device, (torch.int32,)
    check_tensor("logits", logits, ["L", "V"], GPU_STORAGE)
    check_tensor("rows", rows, ["N"], integers, device)
    floats = {
        "uniforms": uniforms,
        "temperatures": temperatures,
        "top_ps": top_ps,
        "min_ps": min_ps,
    }
    for name, values in floats.items():
        check_tensor(name, values, rows.shape, (torch.float32,), device)
    check_tensor("top_ks", top_ks, rows.shape, integers, device)
    check_tensor("banned[0]", ban_samples, ["B"], integers, device)
    check_tensor("banned[1]", ban_ids, ban_samples.shape, integers, device)
    for values in (rows, top_ks, ban_samples, ban_ids, *floats.values()):
        if not values.is_contiguous():
            raise ValueError(f"settings: got strides {values.stride()}, they must be contiguous")
