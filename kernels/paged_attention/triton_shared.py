"""The kernel `attend_shared`: rows that begin alike meet their common keys together."""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.paged_attention.triton_parts import (
    FAR,
    LENGTHS,
    first_seen,
    load_rows,
    scan,
    shared_keys,
    store_partial,
)


@triton.jit  # type: ignore[untyped-decorator]
def _find_span(  # type: ignore[no-untyped-def]
    pid, spans, span_lens, num_spans, threshold, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Span of tile `pid` of MEMBERS segments and the tile's number in it; -1 past the last."""
    span = -1
    tile = 0
    used = 0
    for start in range(0, num_spans, 128):
        i = start + tl.arange(0, 128)
        count = tl.load(spans + 2 * i + 1, mask=i < num_spans, other=0)
        length = tl.load(span_lens + i, mask=i < num_spans, other=0)
        shared = shared_keys(length, count, threshold, BLOCK_N) > 0
        tiles = tl.where(shared, (count + MEMBERS - 1) // MEMBERS, 0)
        ends = used + tl.cumsum(tiles, 0)
        here = (ends - tiles <= pid) & (pid < ends)
        span += tl.sum(tl.where(here, i + 1, 0), 0)
        tile += tl.sum(tl.where(here, pid - ends + tiles, 0), 0)
        used += tl.sum(tiles, 0)
    return span, tile


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator]
def attend_shared(  # type: ignore[no-untyped-def]
    q,
    acc_parts,
    max_parts,
    sum_parts,
    k_cache,
    v_cache,
    cu_q,
    kv_lens,
    tables,
    spans,
    span_lens,
    pre,
    post,
    q_stride,
    token_stride,
    kv_heads,
    table_stride,
    window,
    slots,
    num_spans,
    threshold,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,  # segments of a program
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # >= MEMBERS * GROUP
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend the rows of MEMBERS segments of a span to one split of the keys that they share.

    Arguments as of `attend`. A split that goes on behind the shared keys is left as far as it is
    done; `attend` goes on from there.
    """
    kv_head = tl.program_id(0) % kv_heads
    span, tile = _find_span(
        tl.program_id(0) // kv_heads, spans, span_lens, num_spans, threshold, MEMBERS, BLOCK_N
    )
    if span < 0:
        return
    first_segment = tl.load(spans + 2 * span)
    count = tl.load(spans + 2 * span + 1)
    done = shared_keys(tl.load(span_lens + span), count, threshold, BLOCK_N)
    split = tl.program_id(1)
    begin = split * SPLIT
    if begin >= done:
        return
    heads = kv_heads * GROUP
    r = tl.arange(0, BLOCK_M)
    member = tile * MEMBERS + r // GROUP
    head = kv_head * GROUP + r % GROUP
    live = (r // GROUP < MEMBERS) & (member < count)
    segments = first_segment + member
    tokens = tl.load(cu_q + segments, mask=live, other=0)
    positions = tl.load(kv_lens + segments, mask=live, other=0) - 1
    low = first_seen(positions, window, WINDOW)
    lowest = tl.min(tl.where(live, low, FAR), 0)
    m, norm, acc = scan(
        load_rows(q, tokens, q_stride, head, live, D, BLOCK_D),
        positions,
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.maximum(begin, lowest // BLOCK_N * BLOCK_N),
        tl.minimum(begin + SPLIT, done),
        lowest,
        tables + first_segment.to(tl.int64) * table_stride,
        k_cache,
        v_cache,
        kv_head,
        token_stride,
        pre,
        post,
        window,
        D,
        BLOCK_D,
        BLOCK_N,
        BLOCK_SIZE,
        SOFTCAP,
        WINDOW,
        WIDEN,
    )
    parts = (segments.to(tl.int64) * heads + head) * slots + split - low // SPLIT
    ours = live & (split >= low // SPLIT)
    store_partial(acc_parts, max_parts, sum_parts, parts, ours, m, norm, acc, D)
