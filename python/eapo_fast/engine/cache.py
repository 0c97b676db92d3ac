"""The KV pool: per layer two tensors of blocks, allocated when the layer is first met."""

from __future__ import annotations

import os
from collections.abc import Hashable

import torch
from torch import Tensor

from eapo_fast.errors import ModelError
from eapo_fast.kernels.paged_attention import copy_blocks


class PagedCache:
    """Keys and values of all sequences, [num_blocks, block_size, kv_heads, head_dim] a layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}

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
        for keys, values in self._layers.values():
            copy_blocks(keys, pairs)
            copy_blocks(values, pairs)


def _kind(keys: Tensor) -> str:
    return f"{keys.dtype} [heads {keys.shape[1]}, width {keys.shape[2]}] on {keys.device}"


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a KV pool may take: half of a GPU's free memory, a quarter of RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4
