"""Gated activations in plain torch: any device, any floating-point type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from eapo_fast.kernels.checks import compute_dtype

KINDS = ("silu", "gelu_tanh")


def gated_activation(gate: Tensor, up: Tensor, *, kind: str) -> Tensor:
    """Return `activation(gate) * up`, the activation rounded to the dtype of `gate`."""
    wide = gate.to(compute_dtype(gate.dtype))
    activated = wide * torch.sigmoid(wide) if kind == "silu" else gelu(wide, approximate="tanh")
    return activated.to(gate.dtype) * up
