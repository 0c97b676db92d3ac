"""Paged attention in Triton: which launches a step takes, and of which shapes.

Rows of decode (one query row in their segment) and chunks (more) go through the same kernel with
different tiles. The bits of a row depend on its keys alone: not on the batch, the size of its
chunk's batch, the number of programs, the block size, or `shared`, as far as `tl.dot` gives a row
the same bits in tiles of 16 and of 32 rows (mma.sync does). Chunks of bfloat16 and float16 use
tiles of 64 rows, which Hopper multiplies by other instructions (wgmma): there, a row of a chunk may
differ in rounding from the same row decoded alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from eapo_fast.kernels.kv_write.triton_kernel import kv_write
from eapo_fast.kernels.native import triton_is_interpreted
from eapo_fast.kernels.paged_attention.checks import check_arguments
from eapo_fast.kernels.paged_attention.triton_attend import attend, merge
from eapo_fast.kernels.paged_attention.triton_shared import attend_shared

SPLIT = 512
"""Keys whose partial result is made apart, from position 0 on."""

SHARED_PAYS = 1024
"""Reads of keys that a span must spare, `lens * (members - 1)`, to be attended together."""

_LOG2E = 1 / math.log(2)
_PROGRAMS = 1056
"""Enough programs for a GPU (8 for each of 132 multiprocessors): no need to spread splits."""
_WORKSPACE = 1 << 26
"""Most elements of partial results of chunks; larger ones let a program do all its splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """Arguments that the launches of one call share."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_q: Tensor
    kv_lens: Tensor
    tables: Tensor
    scale: float
    softcap: float
    window: int
    sinks: Tensor | None
    shared: tuple[Tensor, Tensor] | None
    max_kv: int

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.kv_heads

    @property
    def exact(self) -> bool:
        """Whether products are taken in float32, on no tensor core."""
        return self.q.dtype == torch.float32

    @property
    def slots(self) -> int:
        """Most splits that a row touches."""
        count = -(-self.max_kv // SPLIT)
        if self.window > 0:
            count = min(count, -(-self.window // SPLIT) + 1)
        return max(count, 1)

    def tile(self, rows: int) -> dict[str, Any]:
        """Constants of a kernel whose program holds `rows` rows of all heads of a group."""
        dim = self.q.shape[2]
        block_d = max(16, triton.next_power_of_2(dim))
        block_m = max(16, triton.next_power_of_2(rows * self.group))
        return {
            "GROUP": self.group,
            "D": dim,
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
            "SPLIT": SPLIT,
            "WINDOW": self.window > 0,
            "num_warps": 8 if block_m >= 64 or self.exact else 4,
        }

    def keys(self, rows: int) -> dict[str, Any]:
        """Constants of a kernel that reads keys and values; BLOCK_N must not depend on `rows`."""
        dim = max(16, triton.next_power_of_2(self.q.shape[2]))
        return {
            "BLOCK_N": 16 if self.exact else min(64, 8192 // dim),
            "BLOCK_SIZE": self.k_cache.shape[1],
            "SOFTCAP": self.softcap > 0,
            "WIDEN": triton_is_interpreted(),
            "num_stages": 5 if rows == 1 else 3,  # two tiles under way, one
        }

    def factors(self) -> tuple[float, float]:
        """What scores are multiplied by before and after the softcap, in units of log 2."""
        if self.softcap > 0:
            return self.scale / self.softcap, self.softcap * _LOG2E
        return self.scale * _LOG2E, 1.0


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int] | None,
) -> Tensor:
    """Return [T, Hq, D]; arguments as in the public function, no `k` and `v`: they are written."""
    check_arguments(q, k, v, k_cache, v_cache, slots, cu_q, kv_lens, block_tables, sinks, shared)
    q = _packed(q)
    if k is not None and v is not None:
        kv_write(_packed(k), _packed(v), k_cache, v_cache, slots)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0:
        return out
    max_q, max_kv = longest or (int(cu_q.diff().max()), int(kv_lens.max()))
    step = _Step(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_q=cu_q,
        kv_lens=kv_lens,
        tables=block_tables,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
        shared=shared if shared is not None and len(shared[1]) > 0 else None,
        max_kv=max_kv,
    )
    _attend(step, out, 1)
    if max_q > 1:
        _attend(step, out, max(2, (32 if q.dtype == torch.float32 else 64) // step.group))
    return out


def _packed(x: Tensor) -> Tensor:
    return x if x[:1].is_contiguous() else x.contiguous()


def _attend(step: _Step, out: Tensor, queries: int) -> None:
    """Attend the segments of one row (`queries` = 1), or all others in tiles of `queries` rows."""
    segments, slots = len(step.kv_lens), step.slots
    rows = segments if queries == 1 else len(step.q)
    tiles = segments if queries == 1 else len(step.q) // queries + segments
    shared = step.shared if queries == 1 else None
    spread = slots > 1 and tiles * step.kv_heads < _PROGRAMS
    if queries > 1 and rows * step.q.shape[1] * slots * step.q.shape[2] > _WORKSPACE:
        spread = False
    parts = (out, out, out)
    if spread or shared is not None:
        parts = _partial_results(step, rows)
    if shared is not None:
        _attend_shared(step, parts, shared)
    spans = shared or (step.cu_q, step.kv_lens)
    sinks = step.q if step.sinks is None else step.sinks
    programs = tiles * step.kv_heads
    splits = slots + (queries > 1 and step.window > 0) if spread else 1
    launch: Any = attend[(programs, splits)]
    launch(
        step.q,
        out,
        *parts,
        sinks,
        step.k_cache,
        step.v_cache,
        step.cu_q,
        step.kv_lens,
        step.tables,
        *spans,
        *step.factors(),
        step.q.stride(0),
        step.k_cache.stride(1),
        step.kv_heads,
        step.tables.stride(0),
        segments,
        step.window,
        slots,
        0 if shared is None else len(shared[1]),
        SHARED_PAYS,
        QUERIES=queries,
        SPLIT_KV=spread,
        SINKS=step.sinks is not None,
        SHARED=shared is not None,
        **step.tile(queries),
        **step.keys(queries),
    )
    if spread:
        _merge(step, out, parts, sinks, min(queries, 2))


def _merge(
    step: _Step, out: Tensor, parts: tuple[Tensor, Tensor, Tensor], sinks: Tensor, queries: int
) -> None:
    """Fold what `attend` left in `parts`; the tiles need not be those of `attend`."""
    segments = len(step.kv_lens)
    tiles = segments if queries == 1 else len(step.q) // queries + segments
    launch: Any = merge[(tiles * step.kv_heads,)]
    launch(
        out,
        *parts,
        sinks,
        step.cu_q,
        step.kv_lens,
        step.kv_heads,
        segments,
        step.window,
        step.slots,
        QUERIES=queries,
        SINKS=step.sinks is not None,
        **step.tile(queries),
    )


def _attend_shared(
    step: _Step, parts: tuple[Tensor, Tensor, Tensor], shared: tuple[Tensor, Tensor]
) -> None:
    """Leave in `parts` what the rows of every span get from the keys that they share."""
    spans, lens = shared
    members = max(2, 32 // step.group)
    tiles = len(step.kv_lens) // members + len(lens)
    launch: Any = attend_shared[(tiles * step.kv_heads, triton.cdiv(step.max_kv, SPLIT))]
    launch(
        step.q,
        *parts,
        step.k_cache,
        step.v_cache,
        step.cu_q,
        step.kv_lens,
        step.tables,
        spans,
        lens,
        *step.factors(),
        step.q.stride(0),
        step.k_cache.stride(1),
        step.kv_heads,
        step.tables.stride(0),
        step.window,
        step.slots,
        len(lens),
        SHARED_PAYS,
        MEMBERS=members,
        **step.tile(members),
        **step.keys(members),
    )


def _partial_results(step: _Step, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for accumulators [rows, Hq, slots, D], maxima and sums [rows, Hq, slots]."""
    shape = (rows, step.q.shape[1], step.slots)
    acc, top, norm = (
        torch.empty(size, dtype=torch.float32, device=step.q.device)
        for size in ((*shape, step.q.shape[2]), shape, shape)
    )
    return acc, top, norm
