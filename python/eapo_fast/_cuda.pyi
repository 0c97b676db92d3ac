"""CUDA kernels; the module is there when nvcc was. Tensors are on one CUDA device."""

from collections.abc import Sequence

from torch import Tensor

__version__: str

SAMPLE_TILE: int
"""Vocabulary entries that a block of the sampler reads."""

def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    center: str,
    scale: str,
    lengths: Tensor | None,
    eps: float,
    ddof: int,
    valid: Tensor | None,
    out: Tensor,
) -> None: ...
def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None: ...
def copy_blocks(caches: Sequence[Tensor], copies: Tensor) -> None: ...
def attend_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    split: int,
    acc_parts: Tensor,
    max_parts: Tensor,
    sum_parts: Tensor,
    out: Tensor,
) -> None: ...
def sample(
    logits: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    ban_samples: Tensor,
    ban_ids: Tensor,
    tops: Tensor,
    sums: Tensor,
    out_tokens: Tensor,
    out_logprobs: Tensor,
    out_kept: Tensor,
) -> None: ...

class RowProgram:
    """The token program of `run_rows`: [N] tensors by row, numbers for all rows."""

    def __init__(
        self,
        *,
        weights: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        factor: Tensor | None,
        ref_logprob: Tensor | None,
        surrogate: int,
        kl: int,
        least: float,
        most: float,
        delta: float,
        beta: float,
        entropy_coef: float,
    ) -> None: ...

def run_rows(
    z: Tensor,
    *,
    out: Tensor | None,
    rows: Tensor,
    span: Tensor,
    targets: Tensor,
    temperature: float,
    state: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    a: Tensor,
    b: Tensor | None,
    losses: Tensor | None,
    program: RowProgram | None,
    size: int,
    given: bool,
    zeros: bool,
    cluster: int,
) -> None: ...
def longest_row(device: int) -> int:
    """Bytes of the longest row that `run_rows` takes on a device."""
