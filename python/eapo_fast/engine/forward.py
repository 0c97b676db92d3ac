"""The model's forward over one packed step of the scheduler."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast.engine.attention import PagedStep, paged_forward
from eapo_fast.engine.cache import PagedCache


class PagedForward:
    """Runs the transformers model itself on the tokens of a plan."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self._model = model
        self._cache = cache
        self._device = model.device

    def __call__(self, plan: Any) -> Tensor:
        """Return logits [L, V] of the rows that sample in this step."""
        shared = (self._on_device(plan.shared_spans), self._on_device(plan.shared_lens))
        step = PagedStep(
            cache=self._cache,
            slots=self._on_device(plan.slots),
            cu_q=self._on_device(plan.cu_q),
            kv_lens=self._on_device(plan.kv_lens),
            block_tables=self._on_device(plan.block_tables),
            shared=shared if len(plan.shared_lens) else None,
            longest=(plan.max_q_len, plan.max_kv_len),
        )
        with torch.no_grad(), paged_forward(self._model, step):
            logits: Tensor = self._model(
                input_ids=self._on_device(plan.input_ids).unsqueeze(0),
                position_ids=self._on_device(plan.positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._on_device(plan.logits_rows),
            ).logits
        return logits[0]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
