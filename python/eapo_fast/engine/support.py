"""Whether a model can be sampled on paged attention: it is tried, not believed.

A short packed forward, in chunks over scattered blocks, must give the logits of the model's
ordinary forward. What the trial is too short to show (sliding windows, chunked attention) is read
off the masks. Static inspection only words the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast.engine.attention import CallKey, PagedStep, paged_logits, turn_of
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.fingerprint import structure
from eapo_fast.engine.inspection import base_model, blockers, suspects
from eapo_fast.engine.limits import context_limit, vocab_size
from eapo_fast.engine.mode import compute_dtype, sampling_mode
from eapo_fast.engine.probe import attention_calls
from eapo_fast.errors import ModelError

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.03,
    torch.bfloat16: 0.1,
}
"""Largest difference of the two forwards' logits: root mean square, as a share of their spread
(standard deviation). Rounding stays well below it, another attention does not."""

_TF32_TOLERANCE = 0.03
"""float32 on a GPU, whose matrix products may be rounded to TF32."""


@dataclass(frozen=True, slots=True)
class PagedModel:
    """What a trial found out about a model."""

    windows: Mapping[CallKey, int]
    """Sliding windows that only the model's masks know: for `PagedStep.windows`."""
    kv_elements: int
    """Elements of keys and values that one token takes in the pool, over all layers."""
    difference: float | None
    """Measured difference of the two forwards, as `TOLERANCE` counts it; None: the model's own
    logits were not finite, so that it is tried again next time."""


_tried: WeakKeyDictionary[torch.nn.Module, tuple[object, PagedModel]] = WeakKeyDictionary()


def paged_model(model: PreTrainedModel, block_size: int = 16) -> PagedModel:
    """Return what the trial of `model` found; it runs once per model, configuration and dtype.

    Mode, randomness, hooks and configuration of the model are as before.

    Raises:
        ModelError: the model cannot be sampled; says what was measured, and likely why.
    """
    refusals = blockers(model)
    if refusals:
        raise _refused(model, "; ".join(refusals))
    state = block_size, structure(model)
    tried = _tried.get(model)
    if tried is None or tried[0] != state:
        with turn_of(model.config.get_text_config()), sampling_mode(model):
            found = _try(model, block_size)
        if found.difference is None:
            return found
        tried = _tried[model] = state, found
    return tried[1]


def _try(model: PreTrainedModel, block_size: int) -> PagedModel:
    sequences = _sequences(model, vocab_size(model), block_size)
    own = [_own_logits(model, sequence) for sequence in sequences]
    calls = attention_calls(model, sequences[0].unsqueeze(0), context_limit(model))
    problems = [
        f"layer {c.key[0]} ({type(c.module).__name__}): {c.problem}" for c in calls if c.problem
    ]
    if problems:
        raise _refused(model, "; ".join(problems))
    windows = {call.key: call.window for call in calls if call.window and not call.told}
    try:
        paged = _paged_logits(model, sequences, block_size, windows)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        failure = f"a packed forward failed: {type(error).__name__}: {error}"
        raise _refused(model, failure, suspects(model, calls)) from error
    difference, allowed = _difference(paged, own), _tolerance(model)
    if difference is not None and not difference <= allowed:
        measured = (
            f"logits of a packed forward in chunks differ from those of its ordinary forward by "
            f"{difference:.2g} of their spread; allowed is {allowed:g} in {compute_dtype(model)}"
        )
        raise _refused(model, measured, suspects(model, calls))
    return PagedModel(
        windows=windows,
        kv_elements=sum(2 * call.kv_heads * call.width for call in calls),
        difference=difference,
    )


def _refused(model: PreTrainedModel, what: str, why: Sequence[str] = ()) -> ModelError:
    name = type(base_model(model)).__name__
    likely = f". Likely: {'; '.join(why)}" if why else ""
    return ModelError(f"model: {name} cannot be sampled on paged attention: {what}{likely}")


def _sequences(model: PreTrainedModel, size: int, block_size: int) -> list[Tensor]:
    """Return two random sequences, the longer one across a block border where that is cheap."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{n}_token_id", None) for n in ("pad", "bos", "eos")}
    special = {i for ids in special for i in (ids if isinstance(ids, (list, tuple)) else [ids])}
    ordinary = torch.tensor([i for i in range(min(size, 1 << 12)) if i not in special])
    context = context_limit(model)
    lengths = [max(3, min(n, context)) for n in (min(block_size, 16) + 5, 8)]
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(ordinary), (n,), generator=generator) for n in lengths]
    return [ordinary[pick].to(model.device) for pick in picks]


def _own_logits(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=sequence.unsqueeze(0), use_cache=False, return_dict=True
        ).logits
    return logits[0]


def _paged_logits(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    block_size: int,
    windows: Mapping[CallKey, int],
) -> list[Tensor]:
    """Return the logits of each sequence from three packed forwards: two of chunks, one decode."""
    device = model.device
    counts = [-(-len(sequence) // block_size) for sequence in sequences]
    cache = PagedCache(sum(counts), block_size)
    scattered = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(sequences), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(scattered.split(counts)):
        tables[row, : len(blocks)] = blocks
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for chunk in _chunks([len(sequence) for sequence in sequences]):
        positions = [torch.arange(start, stop) for start, stop in chunk]
        slots = [
            tables[row, at // block_size].long() * block_size + at % block_size
            for row, at in enumerate(positions)
        ]
        lengths = torch.tensor([stop - start for start, stop in chunk])
        step = PagedStep(
            cache=cache,
            slots=torch.cat(slots).to(device),
            cu_q=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device),
            kv_lens=torch.tensor([stop for _, stop in chunk], dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            windows=windows,
        )
        ids = torch.cat([s[start:stop] for s, (start, stop) in zip(sequences, chunk, strict=True)])
        logits = paged_logits(model, step, ids, torch.cat(positions).to(device))
        for part, rows in zip(parts, logits.split(lengths.tolist()), strict=True):
            part.append(rows)
    return [torch.cat(part) for part in parts]


def _chunks(lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return three steps of (start, stop) for each sequence; the last is one token of each."""
    cuts = [(0, n // 2, n - 1, n) for n in lengths]
    return [[(cut[i], cut[i + 1]) for cut in cuts] for i in range(3)]


def _difference(paged: Sequence[Tensor], own: Sequence[Tensor]) -> float | None:
    """Return the RMS difference as a share of the logits' spread; None if none are finite."""
    got, want = torch.cat(list(paged)).double(), torch.cat(list(own)).double()
    finite = want.isfinite()
    if not finite.any():
        return None
    want = want[finite]
    spread = want.std().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got[finite] - want).square().mean().sqrt() / spread)


def _tolerance(model: PreTrainedModel) -> float:
    dtype = compute_dtype(model)
    if dtype == torch.float32 and model.device.type == "cuda":
        return _TF32_TOLERANCE
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
