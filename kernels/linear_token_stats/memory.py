"""Memory of the CPU backend: large pages, and a little that is kept from call to call.

The first use of a fresh page costs about as much as a thousand numbers of a logits tile, so big
buffers ask for large pages, and the one that every call needs is not given back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast import _core

MOST_KEPT = 64 << 20
"""Bytes of the buffer that is kept, at most."""
_LARGE = 4 << 20

_spare: list[Tensor] = []


def uninitialised(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor, on large pages if it is large."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _LARGE:
        _core.advise_huge_pages(tensor)
    return tensor


class Workspace:
    """One flat buffer that grows; on `close` it is kept for the next one unless it is too big."""

    def __init__(self) -> None:
        self._bytes = _spare.pop() if _spare else torch.empty(0, dtype=torch.uint8)

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return [count] numbers, overwritten by the next call."""
        size = count * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = uninitialised((size,), torch.uint8)
        return self._bytes[:size].view(dtype)

    def close(self) -> None:
        """Give the buffer back."""
        if 0 < len(self._bytes) <= MOST_KEPT and not _spare:
            _spare.append(self._bytes)
        self._bytes = torch.empty(0, dtype=torch.uint8)
