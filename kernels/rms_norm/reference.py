"""RMS norm in plain torch: any device; float64 is computed in float64."""

from __future__ import annotations

from torch import Tensor

from eapo_fast.kernels.checks import compute_dtype


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool, cast_before_weight: bool
) -> Tensor:
    """Return the norm in the dtype of `x`; arguments as in the public function."""
    wide = x.to(compute_dtype(x.dtype))
    normal = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if cast_before_weight:
        normal = normal.to(x.dtype).to(wide.dtype)
    factor = weight.to(wide.dtype) + (1.0 if unit_offset else 0.0)
    return (normal * factor).to(x.dtype)
