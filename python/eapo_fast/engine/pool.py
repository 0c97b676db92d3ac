"""The KV pool of a sampler: who owns which block, the blocks' tensors, the weights they are of."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eapo_fast import _core
from eapo_fast.engine.cache import PagedCache, host_memory_budget, memory_budget
from eapo_fast.engine.fingerprint import structure, switches, weights
from eapo_fast.engine.params import SamplerConfig


class Pool:
    """Blocks and their tensors; outlives sessions, so that prefixes can be found again.

    Args:
        num_blocks, block_size: shape of the pool.
        host_blocks: blocks in host memory.
        kind: dtype and device of keys and values.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        host_blocks: int,
        kind: tuple[torch.dtype, torch.device],
    ) -> None:
        self.kind = kind
        self.blocks = _core.KvPool(num_blocks, block_size, host_blocks)
        self.cache = PagedCache(num_blocks, block_size, host_blocks)


class WeightsVersion:
    """Notices that a model computes something else than before: other weights, configuration,
    autocast, adapters, or scales.

    Unseen are weights that are written through `.data`, or by another process.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen: object = None

    def changed(self) -> bool:
        """Return whether anything changed since the last call; True the first time."""
        seen, self._seen = self._seen, self._fingerprint()
        return seen != self._seen

    def _fingerprint(self) -> object:
        return weights(self._model), structure(self._model), switches(self._model)


def affordable_blocks(model: PreTrainedModel, block_bytes: int) -> int:
    """Return how many blocks fit the memory that a pool may take."""
    return memory_budget(model.device) // block_bytes


def host_blocks(
    model: PreTrainedModel, config: SamplerConfig, num_blocks: int, block_bytes: int
) -> int:
    """Return the number of blocks in host memory: on a CPU, where there is nothing to gain, 0."""
    if config.host_blocks is not None:
        return config.host_blocks
    if model.device.type == "cpu":
        return 0
    return min(num_blocks, host_memory_budget() // block_bytes)
