"""Draw one token a row: bans, temperature, top-k, top-p and min-p, then inversion of the CDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.native import (
    GPU_STORAGE,
    cpu_refusal,
    cuda_refusal,
    follow_torch_threads,
    triton_refusal,
)
from eapo_fast.kernels.sample import reference

__all__ = ["Draws", "sample"]


class Draws(NamedTuple):
    """What was drawn, one entry a sample."""

    tokens: Tensor
    """[N] int64; -1 where the row has no distribution (NaN, +inf, or all -inf or banned)."""
    logprobs: Tensor
    """[N] of the distribution drawn from (banned, tempered, truncated, renormalised); T = 1 and no
    truncation where the temperature is 0; NaN where the token is -1."""
    kept_mass: Tensor
    """[N] probability that truncation kept, 1 without truncation; NaN where the token is -1."""


def sample(
    logits: Tensor,
    *,
    rows: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    banned: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Draws:
    """Draw N tokens from L rows of logits; the draw is a pure function of the arguments.

    Args:
        logits: [L, V] float32, bfloat16 or float64 (float16 too on a GPU).
        rows: [N] int32, the row of logits of each sample.
        uniforms: [N] float32 in [0, 1); the token is the first, in vocabulary order, whose
            cumulative probability exceeds it.
        temperatures: [N] float32; 0 takes the largest logit (the first of equals).
        top_ks: [N] int32; keeps the k largest logits and all that equal the k-th; <= 0: off.
        top_ps: [N] float32; of what top-k left keeps the fewest largest that hold this share of its
            mass, equals of the last among them; >= 1: off.
        min_ps: [N] float32; keeps tokens at least this probable relative to the most probable;
            <= 0: off.
        banned: (samples, token ids), int32 [B] each: entries that get probability 0.
        backend: "auto" (cpu, triton on a GPU, else reference), "reference" (any device), "cpu",
            "triton" or "cuda" (when it is named).

    Log-probabilities are float32 (float64 from the reference on float64 logits). Raises
    `ValueError` for indices out of range on the CPU, and for a backend that cannot run here.
    """
    chosen = choose_backend(
        "sample",
        backend,
        {"cpu": cpu_refusal, "triton": partial(triton_refusal, dtypes=GPU_STORAGE)},
        logits,
        on_request={"cuda": partial(cuda_refusal, dtypes=GPU_STORAGE)},
    )
    if banned is None:
        none = torch.empty(0, dtype=torch.int32, device=logits.device)
        banned = (none, none)
    return Draws(
        *_implementation(chosen)(
            logits.detach(), rows, uniforms, temperatures, top_ks, top_ps, min_ps, *banned
        )
    )


def _implementation(backend: str) -> Callable[..., Sequence[Tensor]]:
    if backend == "triton":
        from eapo_fast.kernels.sample import triton_kernel

        return triton_kernel.sample
    if backend == "cuda":
        from eapo_fast.kernels.sample import cuda_kernel

        return cuda_kernel.sample
    return _sample_cpu if backend == "cpu" else reference.sample


def _sample_cpu(logits: Tensor, rows: Tensor, uniforms: Tensor, *settings: Tensor) -> list[Tensor]:
    follow_torch_threads()
    temperatures, top_ks, top_ps, min_ps, ban_rows, ban_ids = settings
    tokens = torch.empty(rows.shape, dtype=torch.int64)
    logprobs, kept = torch.empty(rows.shape), torch.empty(rows.shape)
    _core.sample(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        rows,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        uniforms,
        ban_rows,
        ban_ids,
        tokens,
        logprobs,
        kept,
    )
    return [tokens, logprobs, kept]
