"""`linear_token_stats` as torch operators, so that `torch.compile` and checkpointing can handle it.

Whoever changes a signature here changes all three functions that repeat it: operator, fake, way
back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.checks import check_range, compute_dtype
from eapo_fast.kernels.gradient import differentiable_once
from eapo_fast.kernels.linear_token_stats import reference
from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients, spans
from eapo_fast.kernels.linear_token_stats.cpu import CpuHead
from eapo_fast.kernels.linear_token_stats.finite import check_finite
from eapo_fast.kernels.truncated_entropy.reference import Cut

HEADS: dict[str, type[CpuHead] | type[reference.TorchHead]] = {
    "cpu": CpuHead,
    "reference": reference.TorchHead,
}
"""The backends that are always there."""
_STATES = {
    "cpu": (_core.LOSS_STATE, torch.float64),
    "reference": (reference.STATE, None),
    "triton": (9, torch.float32),
    "cuda": (9, torch.float32),
}


def head_of(backend: str) -> Any:
    """Return the class of heads of a backend."""
    if backend in HEADS:
        return HEADS[backend]
    if backend == "cuda":
        from eapo_fast.kernels.linear_token_stats.library_head import LibraryHead

        return LibraryHead
    from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead

    return TritonHead


@torch.library.custom_op("eapo_fast::linear_token_stats", mutates_args=())
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    banned_rows: Tensor | None,
    banned_ids: Tensor | None,
    extras: str,
    chunk_size: int | None,
    backend: str,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob [N], entropy [N], extras [E, N] and the state that the way back needs."""
    check_values(targets, vocab_size, banned_rows, banned_ids, len(hidden))
    head = head_of(backend)(
        hidden,
        weight,
        targets.long(),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        banned=pair(banned_rows, banned_ids),
        chunk_size=chunk_size,
    )
    names, head.truncation = extras.split(), Cut(top_p, top_k, min_p) or None
    for start, stop in spans(len(hidden), head.slab_rows(keep=False), even=chunk_size is None):
        head.read(start, stop, keep=False, powers=bool(names))
        check_finite(head.entropy[start:stop], start)
    further = head.logprob.new_empty(len(names), len(hidden))
    for row, name in zip(further, names, strict=True):
        row.copy_(head.extra(name))
    head.close()
    return head.logprob, head.entropy.clone(), further, head.state


@token_stats.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extras, backend = arguments[8], arguments[10]
    rows = hidden.shape[0]
    logprob = hidden.new_empty(rows, dtype=compute_dtype(hidden.dtype))
    size, dtype = _STATES[backend]
    state = logprob.new_empty(rows, size, dtype=dtype or logprob.dtype)
    further = logprob.new_empty(len(extras.split()), rows)
    return logprob, torch.empty_like(logprob), further, state


@torch.library.custom_op("eapo_fast::linear_token_stats_backward", mutates_args=())
def token_stats_backward(
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    banned_rows: Tensor | None,
    banned_ids: Tensor | None,
    chunk_size: int | None,
    backend: str,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, empty where not wanted.

    a and b [N] are those of the loss in logprob and entropy; None: 0.
    """
    head = head_of(backend)(
        hidden,
        weight,
        targets.long(),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        banned=pair(banned_rows, banned_ids),
        chunk_size=chunk_size,
        wanted=(to_hidden, to_weight, to_bias),
        state=state,
    )
    if a is None:
        assert b is not None
        a = torch.zeros_like(b)
    head.replay(0, len(hidden), Coefficients(a, b))
    found = filled(head.gradients(), hidden)
    head.close()
    return found


@token_stats_backward.register_fake
def _(
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, arguments[-3:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (hidden, weight, targets, bias, temperature, softcap, vocab_size, *banned) = inputs[:9]
    extras, state = output[2:]
    ctx.mark_non_differentiable(extras, state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(state, hidden, weight, targets, bias, *banned)
    ctx.settings = (temperature, softcap, vocab_size)
    ctx.chunk_size, ctx.backend = inputs[10:12]


@differentiable_once
def _backward(ctx: Any, a: Tensor | None, b: Tensor | None, *_: None) -> tuple[Any, ...]:
    if a is None and b is None:
        return (None,) * 15
    state, hidden, weight, targets, bias, *banned = ctx.saved_tensors
    to_hidden, to_weight, _, to_bias = ctx.needs_input_grad[:4]
    of_hidden, of_weight, of_bias = token_stats_backward(
        a, b, state, hidden, weight, targets, bias, *ctx.settings, *banned,
        ctx.chunk_size, ctx.backend, to_hidden, to_weight, to_bias,
    )  # fmt: skip
    return (
        of_hidden if to_hidden else None,
        of_weight if to_weight else None,
        None,
        of_bias if to_bias else None,
        *[None] * 11,
    )


token_stats.register_autograd(_backward, setup_context=_setup)


def check_values(
    targets: Tensor,
    vocab_size: int,
    banned_rows: Tensor | None,
    banned_ids: Tensor | None,
    rows: int,
) -> None:
    """Raise `ValueError` for an id or a row that does not exist."""
    check_range("targets", targets, vocab_size)
    if banned_rows is not None and banned_ids is not None:
        check_range("banned rows", banned_rows, rows)
        check_range("banned ids", banned_ids, vocab_size)


def pair(rows: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Put the two halves of `banned` together again."""
    return None if rows is None or ids is None else (rows, ids)


def filled(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put an empty tensor where there is no gradient: an operator returns tensors."""
    hidden, weight, bias = (like.new_empty(0) if x is None else x for x in gradients)
    return hidden, weight, bias


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `filled` would for gradients of these inputs, as to shape."""
    return filled(
        tuple(
            x.new_empty(x.shape) if want and x is not None else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ),
        hidden,
    )
