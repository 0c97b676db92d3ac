"""Memory of the CPU backend: one buffer that is kept from call to call, on large pages.

The first use of fresh memory costs as much as a matrix product over it. Large pages make that
cheaper where the system has some at hand (35 ms instead of 125 for 272 MB) and many times dearer
where it has to make room for them, so only what lives long asks for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast import _core

MOST_KEPT = 320 << 20
"""Bytes of the buffer that is kept, at most."""
_LARGE = 4 << 20

_spare: list[Tensor] = []


class Workspace:
    """One flat buffer that grows; on `close` it is kept for the next one unless it is too big."""

    def __init__(self) -> None:
        self._bytes = _spare.pop() if _spare else torch.empty(0, dtype=torch.uint8)

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return [count] numbers, overwritten by the next call."""
        size = count * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
            if size >= _LARGE:
                _core.advise_huge_pages(self._bytes)
        return self._bytes[:size].view(dtype)

    def close(self) -> None:
        """Give the buffer back."""
        if 0 < len(self._bytes) <= MOST_KEPT and not _spare:
            _spare.append(self._bytes)
        self._bytes = torch.empty(0, dtype=torch.uint8)
