"""The rows of `triton_rows.py` in CUDA: a row is read from memory once and written once.

It lies in the shared memory of up to eight blocks in between; see `kernel.cu`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from eapo_fast.kernels.native import GPU_STORAGE, cuda_refusal

if TYPE_CHECKING:
    from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass, Span


def refusal(z: Tensor) -> str | None:
    """Return why `run_rows` cannot take logits like `z` [rows, V], or None."""
    reason = cuda_refusal(z, GPU_STORAGE)
    if reason is not None:
        return reason
    from eapo_fast import _cuda

    size, most = z.shape[1] * z.element_size(), _cuda.longest_row(z.device.index or 0)
    if size > most:
        return (
            f"a row of {z.shape[1]} logits has {size} bytes, and the blocks that hold it on this "
            f"GPU have {most} (eight blocks from sm_90 on, else one)"
        )
    return None


def run_rows(
    z: Tensor,
    rows: Tensor,
    span: Tensor,
    targets: Tensor,
    *,
    size: int,
    logprob: Tensor,
    entropy: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    losses: Tensor | None = None,
    state: Tensor | None = None,
    out: Tensor | None = None,
    program: dict[str, Any] | None = None,
    temperature: float = 1.0,
    given: bool = False,
    zeros: bool = False,
    cluster: int = 0,
) -> None:
    """Make statistics of rows of logits, with `program` coefficients, with `out` gradients.

    Queues one launch and waits for nothing. Only what is listed is touched.

    Args:
        z: [rows, V] float32, bfloat16 or float16, any row stride. The fast way needs rows that
            start at multiples of 16 bytes.
        rows: list of int64 rows; `span` [2] int64 says where in it these start and stop, `size`
            how many they are at most.
        targets: [N] int64. One outside the vocabulary makes its row's results NaN.
        logprob, entropy, a, b, losses: [N] float32 to fill; a and b are read where there is no
            program, and no b stands for 0.
        state: [N, 3 or more] float32 to fill with the largest logit, mass and moment of a row.
        out: [rows, V] of z's dtype, or bfloat16 for float32 logits. May be z itself, or lie over
            it if every row starts where its logits do.
        program: as `triton_plan.program_of` makes it: a and b come from the recipe.
        given: whether z and out have a row for each of N; else one for each row of the span.
        zeros: whether rows whose a and b are 0 get a gradient of 0; else they keep what they hold.
        cluster: blocks of a row; 0: as few as leave room for others beside them.

    Raises `ValueError` for shapes and `RuntimeError` for what `refusal` would have named.
    """
    from eapo_fast import _cuda

    _cuda.run_rows(
        z,
        out=out,
        rows=rows,
        span=span,
        targets=targets,
        temperature=temperature,
        state=state,
        logprob=logprob,
        entropy=entropy,
        a=a,
        b=b,
        losses=losses,
        program=None if program is None else _program(program),
        size=size,
        given=given,
        zeros=zeros,
        cluster=cluster,
    )


def pass_refusal(own: RowPass, logits: Tensor) -> str | None:
    """Return why `launch` cannot take the place of `own.launch` for such logits, or None."""
    wanted = {
        "bias": own.bias,
        "softcap": own.softcap,
        "banned tokens": own.bans,
        "cut": own.truncation,
    }
    unknown = [name for name, value in wanted.items() if value is not None]
    return f"it knows no {unknown[0]}" if unknown else refusal(logits)


def launch(
    own: RowPass,
    logits: Tensor,
    out: Tensor,
    span: Span,
    *,
    program: dict[str, Any] | None = None,
    gradient: bool,
    statistics: bool = True,
    powers: bool = False,
    zeros: bool = False,
    given: bool = False,
) -> None:
    """Do what `own.launch` does, but for powers; statistics are made anew where they are there."""
    assert not powers
    run_rows(
        logits,
        own.rows,
        span.edges,
        own.targets,
        size=span.size,
        logprob=own.logprob,
        entropy=own.entropy,
        a=own.a,
        b=own.b,
        losses=own.losses,
        state=own.state if statistics else None,
        out=out if gradient else None,
        program=program,
        temperature=own.temperature,
        given=given,
        zeros=zeros,
    )


def _program(values: dict[str, Any]) -> Any:
    from eapo_fast import _cuda

    return _cuda.RowProgram(
        weights=values["weights"],
        old_logprob=values["old_logprob"],
        advantages=values["advantages"],
        factor=values.get("factor"),
        ref_logprob=values.get("ref_logprob"),
        surrogate=int(values["SURROGATE"]),
        kl=int(values["KL"]),
        least=values["least"],
        most=values["most"],
        delta=values["delta"],
        beta=values["beta"],
        entropy_coef=values["entropy_coef"],
    )
