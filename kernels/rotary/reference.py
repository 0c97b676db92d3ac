"""Rotary position embedding in plain torch: any device, any floating-point type."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [B, H, T, D] in the dtype of `x`; arguments as in the public function."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    return torch.cat((turned.to(x.dtype), kept), dim=-1)
