"""Where the fused ops of a model run: their device, backend and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eapo_fast.kernels.native import GPU_STORAGE, STORAGE, triton_refusal


@dataclass(frozen=True, slots=True)
class Target:
    """A device, the backend whose kernels are used there, and the dtypes these store."""

    device: torch.device
    backend: str
    dtypes: tuple[torch.dtype, ...]

    def takes(self, *tensors: Tensor) -> bool:
        """Whether the kernels take these tensors, of one dtype, and no gradient is wanted."""
        dtype = tensors[0].dtype
        return (
            dtype in self.dtypes
            and not torch.is_grad_enabled()
            and all(
                type(t) in (Tensor, nn.Parameter) and t.device == self.device and t.dtype is dtype
                for t in tensors
            )
        )


def target_of(device: torch.device) -> Target | None:
    """Return what serves a device: the CPU kernels, Triton on a GPU, or nothing."""
    if device.type == "cpu":
        return Target(device, "cpu", STORAGE)
    if triton_refusal(torch.empty(0, device=device), GPU_STORAGE) is None:
        return Target(device, "triton", GPU_STORAGE)
    return None
