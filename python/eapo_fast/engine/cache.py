"""The KV pool: per layer two tensors of blocks, allocated when the layer is first met."""

from __future__ import annotations

import os
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from eapo_fast.errors import ModelError
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
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._host: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def layer(self, call: Hashable, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value blocks of an attention call, for keys `like` [T, heads, width].

        Raises `ModelError` when the pool holds keys of another dtype, device or shape: what they
        say can't be read by this forward.
        """
        held = self._layers.get(call)
        if held is None:
            shape = (self.num_blocks, self.block_size, *like.shape[1:])
            held = self._layers[call] = (like.new_zeros(shape), like.new_zeros(shape))
        keys = held[0]
        if (keys.dtype, keys.device, keys.shape[2:]) != (like.dtype, like.device, like.shape[1:]):
            raise ModelError(
                f"KV pool: layer {call} holds {_kind(keys[0])}, now gets {_kind(like)}. Dtype, "
                f"device and autocast of a model may not change while its pool is in use"
            )
        return held

    def copy(self, pairs: Tensor) -> None:
        """Copy whole blocks, `pairs` [C, 2] int32 of (source, destination), in every layer."""
        copy_blocks([blocks for layer in self._layers.values() for blocks in layer], pairs)

    def swap_out(self, pairs: Tensor) -> None:
        """Copy blocks to the host, `pairs` [C, 2] int32 of (block, host block), in every layer."""
        block, host = pairs.long().unbind(-1)
        for call, layer in self._layers.items():
            for device_side, host_side in zip(layer, self._host_layer(call), strict=True):
                host_side[host] = device_side[block.to(device_side.device)].to(host_side.device)

    def swap_in(self, pairs: Tensor) -> None:
        """Copy blocks back, `pairs` [C, 2] int32 of (host block, block), in every layer."""
        host, block = pairs.long().unbind(-1)
        for call, layer in self._layers.items():
            for device_side, host_side in zip(layer, self._host_layer(call), strict=True):
                device = device_side.device
                device_side[block.to(device)] = host_side[host].to(device)

    def _host_layer(self, call: Hashable) -> tuple[Tensor, Tensor]:
        if call not in self._host:
            keys = self._layers[call][0]
            shape, pin = (self.host_blocks, *keys.shape[1:]), keys.is_cuda
            self._host[call] = (
                torch.empty(shape, dtype=keys.dtype, pin_memory=pin),
                torch.empty(shape, dtype=keys.dtype, pin_memory=pin),
            )
        return self._host[call]


def _kind(keys: Tensor) -> str:
    return f"{keys.dtype} [heads {keys.shape[1]}, width {keys.shape[2]}] on {keys.device}"


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a KV pool may take: half of a GPU's free memory, a quarter of RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return host_memory_budget()


def host_memory_budget() -> int:
    """Return a quarter of the RAM that is free or can be had at once, bytes."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
