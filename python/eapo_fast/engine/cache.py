"""The KV pool: per layer two tensors of blocks, allocated when the layer is first met."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from eapo_fast.kernels.paged_attention import copy_blocks


class PagedCache:
    """Keys and values of all sequences, [num_blocks, block_size, kv_heads, head_dim] a layer.

    Which block belongs to whom is the business of `_core.KvPool`. `host_blocks` more blocks a layer
    lie in (pinned) host memory, for parked sequences.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.host_blocks = host_blocks
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._host: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value blocks of a layer, shaped and typed after `like` [1, heads, T, D].

        A layer that comes with another dtype, shape or device than before starts empty.
        """
        shape = (self.num_blocks, self.block_size, like.shape[1], like.shape[3])
        found = self._layers.get(index)
        if found is None or not _fits(found[0], shape, like):
            found = (like.new_zeros(shape), like.new_zeros(shape))
            self._layers[index] = found
            self._host.pop(index, None)
        return found

    def copy(self, pairs: Tensor) -> None:
        """Copy whole blocks, `pairs` [C, 2] int32 of (source, destination), in every layer."""
        for keys, values in self._layers.values():
            copy_blocks(keys, pairs)
            copy_blocks(values, pairs)

    def swap_out(self, pairs: Tensor) -> None:
        """Copy blocks to the host, `pairs` [C, 2] int32 of (block, host block), in every layer."""
        block, host = pairs.long().unbind(-1)
        for index, layer in self._layers.items():
            for device_side, host_side in zip(layer, self._host_layer(index), strict=True):
                host_side[host] = device_side[block.to(device_side.device)].to(host_side.device)

    def swap_in(self, pairs: Tensor) -> None:
        """Copy blocks back, `pairs` [C, 2] int32 of (host block, block), in every layer."""
        host, block = pairs.long().unbind(-1)
        for index, layer in self._layers.items():
            for device_side, host_side in zip(layer, self._host_layer(index), strict=True):
                device = device_side.device
                device_side[block.to(device)] = host_side[host].to(device)

    def _host_layer(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._host:
            keys = self._layers[index][0]
            shape, pin = (self.host_blocks, *keys.shape[1:]), keys.is_cuda
            self._host[index] = (
                torch.empty(shape, dtype=keys.dtype, pin_memory=pin),
                torch.empty(shape, dtype=keys.dtype, pin_memory=pin),
            )
        return self._host[index]


def _fits(cached: Tensor, shape: tuple[int, ...], like: Tensor) -> bool:
    return cached.shape == shape and cached.dtype == like.dtype and cached.device == like.device


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a KV pool may take: half of a GPU's free memory, a quarter of RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return host_memory_budget()


def host_memory_budget() -> int:
    """Return a quarter of the free RAM, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
