"""Paged attention in plain torch: any device, float64 in float64, else float32 arithmetic.

Segments of similar length go through one gather and two batched products, so that a decode batch
costs a handful of launches; `cu_q` and `kv_lens` on the CPU spare a GPU the wait for their values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eapo_fast.kernels.kv_write.reference import kv_write

_BATCH_ELEMENTS = 1 << 27
"""Scores plus gathered keys and values of one batch at most, unless one segment has more."""


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return [T, Hq, D]; arguments as in the public function."""
    kv_write(k, v, k_cache, v_cache, slots)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, lengths = cu_q[:-1].tolist(), kv_lens.tolist()
    q_lens = cu_q.diff().tolist()
    row_cost = q.shape[1], 2 * k.shape[1] * k.shape[2]
    for batch in _batches(q_lens, lengths, row_cost):
        tokens, positions = _rows(batch, starts, q_lens, lengths, q.device)
        keys, values = (
            _gather(cache, batch, lengths, block_tables) for cache in (k_cache, v_cache)
        )
        rows = tokens.clamp(min=0)
        attended = _attend(q[rows], keys, values, positions, scale, softcap, window, sinks)
        live = tokens >= 0
        out[tokens[live]] = attended[live].to(out.dtype)
    return out


def _batches(
    q_lens: list[int], kv_lens: list[int], row_cost: tuple[int, int]
) -> Iterator[list[int]]:
    """Cut the segments, shortest queries first, into batches of bounded size and padding."""
    scores, gathered = row_cost
    batch: list[int] = []
    shortest = widest = 0
    for segment in sorted(range(len(q_lens)), key=lambda s: (q_lens[s], kv_lens[s])):
        q_len, kv_len = q_lens[segment], kv_lens[segment]
        if q_len == 0 or kv_len == 0:
            continue
        widest = max(widest, kv_len)
        size = (len(batch) + 1) * widest * (q_len * scores + gathered)
        if batch and (q_len > 2 * shortest or size > _BATCH_ELEMENTS):
            yield batch
            batch, widest = [], kv_len
        if not batch:
            shortest = q_len
        batch.append(segment)
    if batch:
        yield batch


def _rows(
    batch: list[int],
    starts: list[int],
    q_lens: list[int],
    kv_lens: list[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rows of q and their positions, [segments, longest query]; -1 pads the rows."""
    table = torch.tensor([(starts[s], q_lens[s], kv_lens[s]) for s in batch])
    start, q_len, kv_len = table.unsqueeze(1).unbind(-1)
    step = torch.arange(max(q_lens[s] for s in batch))
    tokens = torch.where(step < q_len, start + step, -1)
    positions = torch.minimum(kv_len - q_len + step, kv_len - 1)
    return tokens.to(device), positions.to(device)


def _gather(cache: Tensor, batch: list[int], kv_lens: list[int], block_tables: Tensor) -> Tensor:
    """Keys or values [segments, Hkv, longest, D]; 0 past the end of a segment."""
    block_size, device = cache.shape[1], cache.device
    longest = max(kv_lens[s] for s in batch)
    lengths = torch.tensor([kv_lens[s] for s in batch])
    columns = torch.arange(-(-longest // block_size))
    used = (columns * block_size < lengths.unsqueeze(-1)).to(device)
    tables = block_tables[torch.tensor(batch, device=device)][:, : len(columns)].long()
    rows = cache[tables.masked_fill(~used, 0)].flatten(1, 2)[:, :longest]
    live = torch.arange(longest, device=device) < lengths.to(device).unsqueeze(-1)
    dtype = torch.float64 if cache.dtype == torch.float64 else torch.float32
    return rows.to(dtype).masked_fill(~live[:, :, None, None], 0.0).transpose(1, 2)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    """Attend q [S, Q, Hq, D] to keys and values [S, Hkv, K, D]; returns [S, Q, Hq, D]."""
    segments, queries, heads, dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.to(keys.dtype).view(segments, queries, kv_heads, heads // kv_heads, dim)
    packed = grouped.permute(0, 2, 3, 1, 4).reshape(segments, kv_heads, -1, dim)
    scores = packed @ keys.transpose(-1, -2) * scale
    scores = scores.view(segments, kv_heads, -1, queries, keys.shape[2])
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    key = torch.arange(keys.shape[2], device=q.device)
    position = positions.unsqueeze(-1)
    seen = key <= position
    if window > 0:
        seen &= key > position - window
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    mixed = _softmax(scores, sinks).flatten(2, 3) @ values
    by_row = mixed.view(segments, heads, queries, dim)
    return by_row.transpose(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [S, Hkv, Hq / Hkv, Q, K]; a head's sink takes its share and is dropped."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1, 1)
    whole = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    return whole.softmax(-1)[..., :-1]
