"""How a class is tried: on small inputs, on the model's device, against its own results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eapo_fast.engine.fused_target import Target


def sample(target: Target, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Return random numbers that a trial runs on."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(target.device, dtype)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal up to the order of sums: 99 % of the entries of 16 bits have the same ones."""
    if got.dtype is not want.dtype or got.shape != want.shape:
        return False
    narrow = got.dtype in (torch.bfloat16, torch.float16)
    if narrow and (got == want).double().mean() < 0.99:
        return False
    return torch.allclose(got, want, rtol=1e-2 if narrow else 1e-5, atol=1e-6)


def trial(run: Callable[[], bool]) -> bool:
    """Whether `run` says so; a class that cannot even be tried is not recognised."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return run()
    except Exception:
        return False
