"""Root-mean-square norm over the last dimension, as transformers' modules round it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    follow_torch_threads,
    triton_refusal,
)
from eapo_fast.kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]


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
        x: [..., n] float32, bfloat16 or float64 (float16 too on a GPU); the rows lie at one
            distance.
        weight: [n] in the dtype of `x`.
        eps: added to the mean square.
        unit_offset: the factor is `1 + weight`, in float32 (Gemma).
        cast_before_weight: round to the dtype of `x` before the factor; Gemma and OLMo 2 multiply
            in float32.
        backend: "auto" (cpu, triton on a GPU, else reference), "reference" (any device), "cpu" or
            "triton".

    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    form = {"unit_offset": unit_offset, "cast_before_weight": cast_before_weight}
    x, weight = x.detach(), weight.detach()
    chosen = _choose("rms_norm", backend, x)
    if chosen == "triton":
        from eapo_fast.kernels.rms_norm import triton_kernel

        return triton_kernel.rms_norm(x, None, weight, eps, **form)[1]
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps, **form)
    follow_torch_threads()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _core.rms_norm(x, weight, eps, unit_offset, cast_before_weight, out)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    cast_before_weight: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `x + residual`, rounded to its dtype, and the `rms_norm` of that; no gradient.

    In Triton this is one launch, with the bits of the sum and of `rms_norm` one after the other.

    Args:
        x, residual: [..., n] of one shape and dtype, as `x` in `rms_norm`.
        weight, eps, unit_offset, cast_before_weight, backend: as in `rms_norm`.

    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    form = {"unit_offset": unit_offset, "cast_before_weight": cast_before_weight}
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    chosen = _choose("add_rms_norm", backend, x)
    if chosen == "triton":
        from eapo_fast.kernels.rms_norm import triton_kernel

        return triton_kernel.rms_norm(x, residual, weight, eps, **form)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: got {residual.dtype} {list(residual.shape)}, allowed is {x.dtype} "
            f"{list(x.shape)}, as x"
        )
    total = x + residual
    return total, rms_norm(total, weight, eps, **form, backend=chosen)


def _choose(op: str, backend: str, x: Tensor) -> str:
    refusals: dict[str, Refusal] = {
        "cpu": cpu_refusal,
        "triton": partial(triton_refusal, dtypes=GPU_STORAGE),
    }
    return choose_backend(op, backend, refusals, x)
