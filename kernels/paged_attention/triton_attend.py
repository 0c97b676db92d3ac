"""The kernels `attend` and `merge` of paged attention; `triton_parts.py` fixes their order."""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.paged_attention.triton_parts import (
    FAR,
    LENGTHS,
    first_seen,
    fold,
    load_partial,
    load_rows,
    scan,
    shared_keys,
    store_partial,
    store_rows,
)


@triton.jit  # type: ignore[untyped-decorator]
def find_tile(pid, cu_q, kv_lens, segments, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Segment of tile `pid`, its keys, and its query rows from the tile's first one on.

    With QUERIES = 1 a tile is a segment of one row. Else segment s starts at tile
    `cu_q[s] // QUERIES + s`, so that no two share one and `T // QUERIES + S` are enough; segments
    of one row are left out. No row is left where a tile is not used.
    """
    segment = pid
    first = 0
    if QUERIES > 1:
        segment = -1
        for start in range(0, segments, 128):
            s = start + tl.arange(0, 128)
            begin = tl.load(cu_q + s, mask=s < segments, other=0)
            reached = (s < segments) & (begin // QUERIES + s <= pid)
            segment += tl.sum(reached.to(tl.int32), 0)
        first = (pid - tl.load(cu_q + segment) // QUERIES - segment) * QUERIES
    token = tl.load(cu_q + segment)
    rows = tl.load(cu_q + segment + 1) - token
    keys = tl.load(kv_lens + segment)
    position = keys - rows + first
    left = tl.where((rows == 1) == (QUERIES == 1), rows - first, 0)
    return segment, token + first, position, left


@triton.jit  # type: ignore[untyped-decorator]
def _done(  # type: ignore[no-untyped-def]
    segment, spans, span_lens, num_spans, threshold, BLOCK_N: tl.constexpr
):
    """Keys of `segment` that `attend_shared` has folded."""
    done = 0
    for start in range(0, num_spans, 128):
        i = start + tl.arange(0, 128)
        first = tl.load(spans + 2 * i, mask=i < num_spans, other=0)
        count = tl.load(spans + 2 * i + 1, mask=i < num_spans, other=0)
        length = tl.load(span_lens + i, mask=i < num_spans, other=0)
        keys = shared_keys(length, count, threshold, BLOCK_N)
        ours = (first <= segment) & (segment < first + count)
        done += tl.sum(tl.where(ours, keys, 0), 0)
    return done


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q,  # [T, heads, D], rows q_stride apart
    out,  # [T, heads, D], written unless SPLIT_KV
    acc_parts,  # [rows, heads, slots, D] fp32; rows are segments with QUERIES = 1, else tokens
    max_parts,  # [rows, heads, slots] fp32
    sum_parts,  # [rows, heads, slots] fp32
    sinks,  # [heads]
    k_cache,  # [blocks, BLOCK_SIZE, kv_heads, D]
    v_cache,
    cu_q,  # [S + 1] int32
    kv_lens,  # [S] int32
    tables,  # [S, .] int32
    spans,  # [P, 2] int32
    span_lens,  # [P] int32
    pre,
    post,
    q_stride,
    token_stride,  # kv_heads * D
    kv_heads,
    table_stride,
    segments,
    window,
    slots,  # splits that a row touches at most
    num_spans,
    threshold,
    GROUP: tl.constexpr,  # query heads a key head
    QUERIES: tl.constexpr,  # query rows of a program
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # >= QUERIES * GROUP
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_KV: tl.constexpr,  # one split a program, partial results; else all splits, `out`
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,  # needs QUERIES = 1
    WIDEN: tl.constexpr,
):
    """Attend QUERIES rows of one segment, the query heads of one key head packed with them."""
    kv_head = tl.program_id(0) % kv_heads
    segment, token, position, left = find_tile(
        tl.program_id(0) // kv_heads, cu_q, kv_lens, segments, QUERIES
    )
    if left <= 0:
        return
    heads = kv_heads * GROUP
    r = tl.arange(0, BLOCK_M)
    query = r // GROUP
    head = kv_head * GROUP + r % GROUP
    live = (query < QUERIES) & (query < left)
    tokens = token + query
    positions = tl.where(live, position + query, -1)
    low = first_seen(positions, window, WINDOW)
    lowest = tl.min(tl.where(live, low, FAR), 0)
    end = position + tl.minimum(left, QUERIES)
    done = 0
    if SHARED:
        done = _done(segment, spans, span_lens, num_spans, threshold, BLOCK_N)
    table = tables + segment.to(tl.int64) * table_stride
    rows = tokens
    if QUERIES == 1:
        rows = segment + query
    parts = (rows.to(tl.int64) * heads + head) * slots - low // SPLIT
    packed = load_rows(q, tokens, q_stride, head, live, D, BLOCK_D)
    first_split = lowest // SPLIT
    last_split = (end + SPLIT - 1) // SPLIT
    if SPLIT_KV:
        first_split += tl.program_id(1)
        last_split = tl.minimum(last_split, first_split + 1)
        if (first_split >= last_split) | (tl.minimum(end, first_split * SPLIT + SPLIT) <= done):
            return
    m_row = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm_row = tl.zeros([BLOCK_M], tl.float32)
    acc_row = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(first_split, last_split):
        begin = split * SPLIT
        first = tl.maximum(tl.maximum(begin, done), lowest // BLOCK_N * BLOCK_N)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if SHARED:
            ours = live & (begin + tl.zeros_like(low) < done) & (split >= low // SPLIT)
            m, norm, acc = load_partial(
                acc_parts, max_parts, sum_parts, parts + split, ours, D, BLOCK_D
            )
        m, norm, acc = scan(
            packed,
            positions,
            m,
            norm,
            acc,
            first,
            tl.minimum(begin + SPLIT, end),
            lowest,
            table,
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
        if SPLIT_KV:
            ours = live & (split >= low // SPLIT) & (begin <= positions)
            store_partial(acc_parts, max_parts, sum_parts, parts + split, ours, m, norm, acc, D)
        else:
            m_row, norm_row, acc_row = fold(m_row, norm_row, acc_row, m, norm, acc)
    if not SPLIT_KV:
        store_rows(out, sinks, tokens, head, heads, live, m_row, norm_row, acc_row, D, SINKS)


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator]
def merge(  # type: ignore[no-untyped-def]
    out,
    acc_parts,
    max_parts,
    sum_parts,
    sinks,
    cu_q,
    kv_lens,
    kv_heads,
    segments,
    window,
    slots,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Fold the partial results of a tile of `attend` with SPLIT_KV, split after split."""
    kv_head = tl.program_id(0) % kv_heads
    segment, token, position, left = find_tile(
        tl.program_id(0) // kv_heads, cu_q, kv_lens, segments, QUERIES
    )
    if left <= 0:
        return
    heads = kv_heads * GROUP
    r = tl.arange(0, BLOCK_M)
    query = r // GROUP
    head = kv_head * GROUP + r % GROUP
    live = (query < QUERIES) & (query < left)
    tokens = token + query
    positions = tl.where(live, position + query, -1)
    low = first_seen(positions, window, WINDOW)
    rows = tokens
    if QUERIES == 1:
        rows = segment + query
    parts = (rows.to(tl.int64) * heads + head) * slots - low // SPLIT
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = position + tl.minimum(left, QUERIES)
    first_split = tl.min(tl.where(live, low, FAR), 0) // SPLIT
    for split in range(first_split, (end + SPLIT - 1) // SPLIT):
        ours = live & (split >= low // SPLIT) & (split * SPLIT <= positions)
        next_m, next_norm, next_acc = load_partial(
            acc_parts, max_parts, sum_parts, parts + split, ours, D, BLOCK_D
        )
        m, norm, acc = fold(m, norm, acc, next_m, next_norm, next_acc)
    store_rows(out, sinks, tokens, head, heads, live, m, norm, acc, D, SINKS)
