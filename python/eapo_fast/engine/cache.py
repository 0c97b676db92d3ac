"""The KV pool: per layer two tensors of blocks, allocated when the layer is first met."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from eapo_fast.kernels.paged_attention import copy_blocks


class PagedCache:
    """Keys and values of all sequences, [num_blocks, block_size, kv_heads, head_dim] a layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value blocks of a layer, shaped after `like` [1, heads, T, width]."""
        if index not in self._layers:
            shape = (self.num_blocks, self.block_size, like.shape[1], like.shape[3])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def copy(self, pairs: Tensor) -> None:
        """Copy whole blocks, `pairs` [C, 2] int32 of (source, destination), in every layer."""
        for keys, values in self._layers.values():
            copy_blocks(keys, pairs)
            copy_blocks(values, pairs)


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a KV pool may take: half of a GPU's free memory, a quarter of RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
