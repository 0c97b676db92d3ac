"""Small arrays to and from a GPU: one copy each way, and one wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}
_ALIGNED = 4
"""Elements of 4 bytes that begin at multiples of 16 bytes, as kernels are compiled for."""


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Return int32 and float32 arrays of one dimension on the device; one copy on a GPU.

    On the CPU the tensors share memory with the arrays.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _unpacked(torch.from_numpy(_packed(arrays)).to(device, non_blocking=True), arrays)


def _room(array: NDArray[Any]) -> int:
    return -(-len(array) // _ALIGNED) * _ALIGNED


def _packed(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """Return the arrays' bits one behind the other."""
    packed = np.zeros(sum(map(_room, arrays)), dtype=np.int32)
    start = 0
    for array in arrays:
        packed[start : start + len(array)] = array.view(np.int32)
        start += _room(array)
    return packed


def _unpacked(packed: Tensor, like: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Return the tensors that lie one behind the other in `packed`."""
    pieces = packed.split([_room(array) for array in like])
    return [
        piece[: len(array)].view(_DTYPES[array.dtype])
        for piece, array in zip(pieces, like, strict=True)
    ]


def download(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return tensors of one device as arrays; on a GPU their copies are queued, then waited for."""
    if all(not tensor.is_cuda for tensor in tensors):
        return [tensor.cpu().numpy() for tensor in tensors]
    hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [host.numpy() for host in hosts]
