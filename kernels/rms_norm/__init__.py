"""Root-mean-square norm over the last dimension, as transformers' modules round it."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.native import cpu_refusal, follow_torch_threads
from eapo_fast.kernels.rms_norm import reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    cast_before_weight: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` in the dtype of `x`; no gradient.

    Computed in float32 (float64 for float64). With both flags as they are this is Llama's and
    Qwen's norm. In bfloat16 the result is that of the module bit for bit, but for the order in
    which the mean is summed: rare entries differ by one unit in the last place.

    Args:
        x: [..., n] float32, bfloat16 or float64; the rows lie at one distance.
        weight: [n] in the dtype of `x`.
        eps: added to the mean square.
        unit_offset: the factor is `1 + weight`, in float32 (Gemma).
        cast_before_weight: round to the dtype of `x` before the factor; Gemma and OLMo 2 multiply
            in float32.
        backend: "auto", "reference" (any device) or "cpu".

    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    x, weight = x.detach(), weight.detach()
    if choose_backend("rms_norm", backend, {"cpu": cpu_refusal}, x) == "reference":
        return reference.rms_norm(
            x, weight, eps, unit_offset=unit_offset, cast_before_weight=cast_before_weight
        )
    follow_torch_threads()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _core.rms_norm(x, weight, eps, unit_offset, cast_before_weight, out)
    return out
