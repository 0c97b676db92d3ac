"""The product in the middle of a gated MLP: SwiGLU and GeGLU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.errors import suggest
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.gated_activation import reference
from eapo_fast.kernels.gated_activation.reference import KINDS
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    follow_torch_threads,
    triton_refusal,
)

__all__ = ["KINDS", "gated_activation"]


def gated_activation(
    gate: Tensor, up: Tensor, kind: str = "silu", *, backend: str = "auto"
) -> Tensor:
    """Return `activation(gate) * up` in the dtype of `gate`, contiguous; no gradient.

    Args:
        gate: [..., n] float32, bfloat16 or float64 (float16 too on a GPU); the rows lie at one
            distance.
        up: like `gate`; both may be halves of one tensor.
        kind: "silu" (`x * sigmoid(x)`) or "gelu_tanh" (the tanh approximation of GELU).
        backend: "auto" (cpu, triton on a GPU, else reference), "reference" (any device), "cpu" or
            "triton".

    As in torch the activation is rounded to the dtype before the product; in bfloat16 the result is
    torch's bit for bit but for rare entries, which differ by one unit in the last place.
    Raises `ValueError` or `TypeError` that names the argument which does not fit.
    """
    if kind not in KINDS:
        raise ValueError(
            f"kind: got {kind!r}, allowed is one of {', '.join(KINDS)}.{suggest(str(kind), KINDS)}"
        )
    gate, up = gate.detach(), up.detach()
    chosen = choose_backend(
        "gated_activation",
        backend,
        {"cpu": cpu_refusal, "triton": partial(triton_refusal, dtypes=GPU_STORAGE)},
        gate,
    )
    if chosen == "triton":
        from eapo_fast.kernels.gated_activation import triton_kernel

        return triton_kernel.gated_activation(gate, up, kind=kind)
    if chosen == "reference":
        return reference.gated_activation(gate, up, kind=kind)
    follow_torch_threads()
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _core.gated_activation(gate, up, kind, out)
    return out
