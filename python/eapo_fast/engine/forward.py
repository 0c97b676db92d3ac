"""The model's forward over one packed step of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast.engine.attention import CallKey, PagedStep, paged_logits
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.graphs import DecodeGraphs


class PagedForward:
    """Runs the transformers model itself on the tokens of a plan.

    Args:
        model: causal LM in eval mode.
        cache: KV blocks.
        windows: sliding windows that only the model's masks know.
        graphs: runs the decode-only steps where there is one; of the same model and cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        windows: Mapping[CallKey, int],
        graphs: DecodeGraphs | None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._windows = windows
        self._graphs = graphs
        self._device = model.device

    def __call__(self, plan: Any) -> Tensor:
        """Return logits [L, V] of the rows that sample in this step; valid until the next call."""
        logits = self._graphs.forward(plan) if self._graphs is not None else None
        return self._packed(plan) if logits is None else logits

    def _packed(self, plan: Any) -> Tensor:
        shared = (self._on_device(plan.shared_spans), self._on_device(plan.shared_lens))
        step = PagedStep(
            cache=self._cache,
            slots=self._on_device(plan.slots),
            cu_q=self._on_device(plan.cu_q),
            kv_lens=self._on_device(plan.kv_lens),
            block_tables=self._on_device(plan.block_tables),
            shared=shared if len(plan.shared_lens) else None,
            longest=(plan.max_q_len, plan.max_kv_len),
            windows=self._windows,
        )
        return paged_logits(
            self._model,
            step,
            self._on_device(plan.input_ids),
            self._on_device(plan.positions),
            self._on_device(plan.logits_rows),
        )

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
