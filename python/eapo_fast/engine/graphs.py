"""Decode-only steps on static buffers, so that a GPU replays one captured forward per size.

A captured forward reads parameters where they lie: an optimizer step that changes them in place
needs nothing. What is baked in are addresses and everything that the forward does in Python; when
any of that changes (weights moved or replaced, adapters added, switched or rescaled, modules
exchanged, hooks), `refresh` drops the captured forwards. A new KV pool takes a new `DecodeGraphs`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast.engine.attention import CallKey, PagedStep, paged_logits
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.fingerprint import storage, structure
from eapo_fast.engine.head import head_into

_LEAST_WIDTH = 8

_capturing = threading.Lock()
"""A process captures one graph at a time: an expert's model may want to while the policy does."""


@dataclass(frozen=True, slots=True)
class _Size:
    rows: int
    width: int
    """Blocks of a row."""
    spans: int
    """Shared prefixes."""


def bucket_rows(rows: int) -> int:
    """Return the rows that `rows` are padded to: 1, 2, 4, 8, .. 64, .. 256, powers of two."""
    if rows <= 8 or rows > 256:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16
    return -(-rows // step) * step


def _size_of(plan: Any) -> _Size:
    """Return the size that a plan is padded to.

    Spans that are left empty cost next to nothing, a capture some 0.1 s: as groups end one by one,
    their number alone shall not ask for another one.
    """
    width, spans = plan.block_tables.shape[1], len(plan.shared_lens)
    rows = bucket_rows(len(plan.input_ids))
    return _Size(
        rows=rows,
        width=max(_LEAST_WIDTH, 1 << (width - 1).bit_length()),
        spans=1 << (max(spans, rows // 4) - 1).bit_length() if spans else 0,
    )


class _Buffers:
    """Inputs of steps of one size, on the host and, for a GPU, once more there.

    Rows of padding have slot -1 and no keys; what lies in their tables, and behind the keys of
    other rows, is never read. Spans of padding have no segments.
    """

    def __init__(self, size: _Size, device: torch.device) -> None:
        rows, width, spans = size.rows, size.width, size.spans
        on_gpu = device.type == "cuda"
        long_shapes = [(rows,)] * 3
        int_shapes = [(rows,), (rows, width), (spans, 2), (spans,)]
        self._host = tuple(
            torch.zeros(sum(map(_room, shapes)), dtype=dtype, pin_memory=on_gpu)
            for shapes, dtype in ((long_shapes, torch.int64), (int_shapes, torch.int32))
        )
        self._device = tuple(x.to(device) for x in self._host) if on_gpu else self._host
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.input_ids, self.positions, self.slots = _cut(self._device[0], long_shapes)
        self.kv_lens, self.block_tables, self.shared_spans, self.shared_lens = _cut(
            self._device[1], int_shapes
        )
        longs, ints = _cut(self._host[0], long_shapes), _cut(self._host[1], int_shapes)
        self._arrays = [x.numpy() for x in (*longs, *ints)]  # once: a step waits for `load`

    def load(self, plan: Any) -> None:
        """Copy a plan of at most this size into the buffers.

        The step before must have been waited for (its tokens were read): its copies are done then.
        """
        rows, spans, width = len(plan.input_ids), len(plan.shared_lens), plan.block_tables.shape[1]
        ids, positions, slots, kv_lens, tables, pairs, shared = self._arrays
        for into, values, padding in (
            (ids, plan.input_ids, 0),
            (positions, plan.positions, 0),
            (slots, plan.slots, -1),
            (kv_lens, plan.kv_lens, 0),
        ):
            into[:rows], into[rows:] = values, padding
        tables[:rows, :width] = plan.block_tables
        pairs[:spans], pairs[spans:] = plan.shared_spans, 0
        shared[:spans], shared[spans:] = plan.shared_lens, 0
        if self._device is not self._host:
            for device, host in zip(self._device, self._host, strict=True):
                device.copy_(host, non_blocking=True)


def _room(shape: Sequence[int]) -> int:
    """Elements that a tensor takes in a buffer whose tensors begin at multiples of 16 bytes."""
    return -(-prod(shape) // 4) * 4


def _cut(buffer: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the tensors that lie one behind the other in `buffer`."""
    pieces = buffer.split([_room(shape) for shape in shapes])
    return [p[: prod(shape)].view(*shape) for p, shape in zip(pieces, shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    logits: Tensor
    """[rows, V], overwritten by every replay."""


class DecodeGraphs:
    """Runs decode-only steps of one model and KV pool.

    Args:
        model: causal LM in eval mode.
        cache: KV pool.
        windows: sliding windows that only the model's masks know.
        capture: replay captured CUDA graphs; otherwise the same static steps run eagerly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        *,
        windows: Mapping[CallKey, int],
        capture: bool,
    ) -> None:
        self._model = model
        self._cache = cache
        self._windows = windows
        self.capture = capture
        self._device = model.device
        self._buffers: dict[_Size, _Buffers] = {}
        self._captured: dict[_Size, _Captured] = {}
        self._baked: object = None
        self._logits: Tensor | None = None
        self._pool: Any = None
        self._side: Any = None

    def refresh(self) -> None:
        """Forget captured forwards that no longer are the model's; once before each sampling."""
        if not self.capture:
            return
        baked = structure(self._model), storage(self._model)
        if baked != self._baked:
            self._captured.clear()
            self._logits = self._pool = None  # torch takes no pool whose graphs are all gone
            self._baked = baked

    def forward(self, plan: Any) -> Tensor | None:
        """Return logits [L, V] of a plan's `logits_rows`, or None if it has more than decode rows.

        The logits are overwritten by the next call.
        """
        rows = len(plan.input_ids)
        if rows != len(plan.kv_lens):
            return None
        size = _size_of(plan)
        with torch.inference_mode(False):  # buffers outlive somebody's inference mode
            buffers = self._buffers.get(size)
            if buffers is None:
                buffers = self._buffers[size] = _Buffers(size, self._device)
            buffers.load(plan)
            logits = self._logits_of(size, buffers, len(plan.shared_lens))[:rows]
        if len(plan.logits_rows) == rows:
            return logits
        return logits[torch.from_numpy(plan.logits_rows).to(self._device)]

    def _logits_of(self, size: _Size, buffers: _Buffers, spans: int) -> Tensor:
        if self.capture:
            if size not in self._captured:
                self._try_capture(size, buffers)
            captured = self._captured.get(size)
            if captured is not None:
                captured.replay()
                return captured.logits
        return self._run(size, buffers, spans)

    def _run(self, size: _Size, buffers: _Buffers, spans: int) -> Tensor:
        """Run the forward of loaded buffers; returns logits [rows, V]."""
        shared = (buffers.shared_spans[:spans], buffers.shared_lens[:spans]) if spans else None
        step = PagedStep(
            cache=self._cache,
            slots=buffers.slots,
            cu_q=buffers.cu_q,
            kv_lens=buffers.kv_lens,
            block_tables=buffers.block_tables,
            shared=shared,
            longest=(1, size.width * self._cache.block_size),
            windows=self._windows,
        )
        return paged_logits(self._model, step, buffers.input_ids, buffers.positions)

    def _try_capture(self, size: _Size, buffers: _Buffers) -> None:
        """Capture the forward of one size; a model that cannot be captured runs eagerly."""

        def run() -> Tensor:
            return self._run(size, buffers, size.spans)

        try:
            with _capturing, _no_autocast_cache():
                self._captured[size] = self._record(run)
        except RuntimeError as error:
            self.capture = False
            self._captured.clear()
            warnings.warn(
                f"{type(self._model).__name__}: its forward cannot be captured in a CUDA graph, so "
                f"decode steps are launched one by one ({str(error).splitlines()[0]})",
                RuntimeWarning,
                stacklevel=2,
            )

    def _record(self, run: Callable[[], Tensor]) -> _Captured:
        """Run a forward until its kernels are compiled, then capture it.

        Writing the same keys to the same slots again changes nothing, so a real step may warm up.
        All graphs share one memory pool and one buffer of logits: only one of them runs at a time.
        """
        if self._side is None:  # one for all: libraries keep memory for every stream
            self._side = torch.cuda.Stream(self._device)
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits = run()
            if not self._captured:  # libraries may choose by what the first run left
                logits = run()
        torch.cuda.current_stream().wait_stream(side)
        if self._logits is None or len(self._logits) < len(logits):
            self._logits = torch.empty_like(logits)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        out = self._logits[: len(logits)]
        graph = torch.cuda.CUDAGraph()
        # Other threads (scoring, an expert's model) may use the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            self._run_into(out, run)
        return _Captured(graph.replay, out)

    def _run_into(self, out: Tensor, run: Callable[[], Tensor]) -> None:
        """Run a forward whose logits end up in `out`, without a copy where the head can do it."""
        with head_into(self._model, out):
            logits = run()
        if logits.data_ptr() != out.data_ptr():
            out.copy_(logits)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Have autocast cast weights inside the graph, so that every replay sees their values."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
