"""Parts of the Triton kernels of paged attention: one order of additions, whatever the launch.

A row's keys are cut into splits of `SPLIT` positions from position 0, a split into tiles of
`BLOCK_N`. A split is the fold of its tiles in their order, a row the fold of its splits in theirs.
Which program does which part (one for all splits, one a split, one for a shared prefix) is the
host's choice and changes no addition.

A partial result of a row is (m, norm, acc): the largest score in units of log 2, the sum of
`2 ** (score - m)`, and the sum of values with these weights; (-inf, 0, 0) before any key. The sum
is a product with ones, so that its order is that of `tl.dot` and not of a thread layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.triton_functions import LOG2E, tanh

LENGTHS = ["segments", "num_spans", "table_stride", "window", "slots", "threshold"]
"""Arguments that change from call to call: no kernel is compiled for their values."""

FAR = tl.constexpr(1 << 30)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a, b, c, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + c in float32; WIDEN for the interpreter, which multiplies no bfloat16."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def fold(m, norm, acc, next_m, next_norm, next_acc):  # type: ignore[no-untyped-def]
    """Join two partial results; the roundings are spelt out, the same in every kernel."""
    top = tl.maximum(m, next_m)
    safe = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp2(m - safe)
    new = tl.exp2(next_m - safe)
    wide = tl.broadcast_to(new[:, None], next_acc.shape)
    return top, tl.fma(next_norm, new, norm * old), tl.fma(next_acc, wide, acc * old[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def finish(m, norm, acc, sink, SINKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Divide by the sum, the head's sink included; 0 where there was no key."""
    if SINKS:
        sink = sink * LOG2E
        top = tl.maximum(m, sink)
        safe = tl.where(top == float("-inf"), 0.0, top)
        old = tl.exp2(m - safe)
        norm = tl.fma(norm, old, tl.exp2(sink - safe))
        acc = acc * old[:, None]
    return acc / tl.where(norm == 0.0, 1.0, norm)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def scan(  # type: ignore[no-untyped-def]
    q,  # [BLOCK_M, BLOCK_D]
    position,  # [BLOCK_M] of each row, -1 where there is none
    m,
    norm,
    acc,
    first,  # multiple of BLOCK_N
    last,
    lowest,  # keys before it are seen by no row
    table,  # blocks of the sequence
    k_cache,
    v_cache,
    head,
    token_stride,
    pre,
    post,
    window,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Fold the tiles of keys `first` .. `last - 1` into (m, norm, acc)."""
    d = tl.arange(0, BLOCK_D)
    ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(q.dtype)
    sums = tl.broadcast_to(norm[:, None], [norm.shape[0], 16])
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live = (key >= lowest) & (key < last)
        block = tl.load(table + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + key % BLOCK_SIZE) * token_stride + head * D
        keys = tl.load(
            k_cache + row[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0
        )
        scores = _dot(q, keys, tl.zeros([q.shape[0], BLOCK_N], tl.float32), WIDEN) * pre
        if SOFTCAP:
            scores = tanh(scores) * post
        seen = live[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - safe[:, None]).to(q.dtype)
        old = tl.exp2(m - safe)
        values = tl.load(
            v_cache + row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        sums = _dot(weights, ones, sums * old[:, None], WIDEN)
        acc = _dot(weights, values, acc * old[:, None], WIDEN)
        m = top
    return m, tl.max(sums, 1), acc


@triton.jit  # type: ignore[untyped-decorator]
def first_seen(position, window, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """First key that the rows at `position` see."""
    lowest = tl.zeros_like(position)
    if WINDOW:
        lowest = tl.maximum(position - window + 1, 0)
    return lowest


@triton.jit  # type: ignore[untyped-decorator]
def shared_keys(length, count, threshold, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of a span that `attend_shared` folds: whole tiles, 0 where it does not pay."""
    pays = length * (count - 1) >= threshold
    return tl.where(pays, length // BLOCK_N * BLOCK_N, 0)


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(  # type: ignore[no-untyped-def]
    source, row, stride, head, live, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Vectors [BLOCK_M, BLOCK_D] of (row, head), 0 where not live."""
    d = tl.arange(0, BLOCK_D)
    offsets = row[:, None].to(tl.int64) * stride + head[:, None] * D + d[None, :]
    return tl.load(source + offsets, mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def load_partial(  # type: ignore[no-untyped-def]
    acc_parts, max_parts, sum_parts, at, live, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Partial results at indices `at`, empty ones where not live."""
    d = tl.arange(0, BLOCK_D)
    m = tl.load(max_parts + at, mask=live, other=float("-inf"))
    norm = tl.load(sum_parts + at, mask=live, other=0.0)
    offsets = at[:, None] * D + d[None, :]
    acc = tl.load(acc_parts + offsets, mask=live[:, None] & (d < D)[None, :], other=0.0)
    return m, norm, acc


@triton.jit  # type: ignore[untyped-decorator]
def store_partial(  # type: ignore[no-untyped-def]
    acc_parts,
    max_parts,
    sum_parts,
    at,
    live,
    m,
    norm,
    acc,
    D: tl.constexpr,
):
    d = tl.arange(0, acc.shape[1])
    tl.store(max_parts + at, m, mask=live)
    tl.store(sum_parts + at, norm, mask=live)
    tl.store(acc_parts + at[:, None] * D + d[None, :], acc, mask=live[:, None] & (d < D)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(  # type: ignore[no-untyped-def]
    out,
    sinks,
    token,
    head,
    heads,
    live,
    m,
    norm,
    acc,
    D: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Finish the rows and write them to `out` [T, heads, D]."""
    d = tl.arange(0, acc.shape[1])
    sink = tl.zeros_like(m)
    if SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
    mixed = finish(m, norm, acc, sink, SINKS).to(out.dtype.element_ty)
    offsets = (token.to(tl.int64) * heads + head)[:, None] * D + d[None, :]
    tl.store(out + offsets, mixed, mask=live[:, None] & (d < D)[None, :])
