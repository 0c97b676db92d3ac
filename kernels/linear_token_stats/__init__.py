"""Log-probability and entropy of tokens straight from hidden states: no full-batch logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eapo_fast.errors import suggest
from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import (
    FLOATS,
    INTEGERS,
    check_integer,
    check_positive,
    check_tensor,
)
from eapo_fast.kernels.linear_token_stats.finite import (
    NonFiniteError,
    first_bad,
    no_distribution,
)
from eapo_fast.kernels.linear_token_stats.operator import token_stats
from eapo_fast.kernels.native import GPU_STORAGE, cpu_refusal, triton_refusal
from eapo_fast.kernels.truncated_entropy import check_cut
from eapo_fast.kernels.truncated_entropy.reference import Cut

__all__ = [
    "EXTRAS",
    "REFUSALS",
    "NonFiniteError",
    "TokenStats",
    "autocast_head",
    "check_head",
    "linear_token_stats",
]

EXTRAS = ("max_logprob", "p_max", "sum_p2", "sum_p3", "kept_mass", "truncated_entropy")
"""Statistics on request, not differentiable: ln of the largest p, that p, sums of p^2 and of p^3,
probability and renormalised entropy of the tokens that top_p, top_k and min_p keep."""


def _library_refusal(hidden: Tensor) -> str | None:
    reason = triton_refusal(hidden, ())
    if reason is not None:
        return reason
    from eapo_fast.kernels.linear_token_stats.library_head import library_refusal

    return library_refusal(hidden)


REFUSALS: dict[str, Refusal] = {
    "cpu": cpu_refusal,
    "cuda": _library_refusal,
    "triton": lambda x: triton_refusal(x, GPU_STORAGE),
}
"""The backends of an LM head, fastest first, and why one cannot run on given hidden states."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStats:
    """Statistics of N tokens; float32, or float64 for float64 inputs."""

    logprob: Tensor
    """[N] log-probability of the target, in nats; -inf where the target is banned."""
    entropy: Tensor
    """[N] Shannon entropy of the distribution, in nats."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, detached, by the names asked for."""

    def check(self) -> None:
        """Raise `NonFiniteError` that names the first token without a distribution.

        On a GPU nothing else does; this waits for it.
        """
        token = int(first_bad(self.entropy.detach()))
        if token >= 0:
            raise no_distribution(token)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
    extras: Sequence[str] = (),
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Return log-probability and entropy of `targets` under softmax of the LM head's logits.

    `logits = cap(hidden @ weight.T + bias) / temperature`. Differentiable once in `hidden`,
    `weight` and `bias` through both outputs. At most `chunk_size` rows of logits exist at a time.

    Args:
        hidden: [N, H] float32, float64, bfloat16 or float16.
        weight: [V, H] in the dtype of `hidden`; autocast rounds it to that. Products and sums are
            float32 (float64 for float64), the gradient of the weight is rounded once, after the
            last row.
        targets: [N] token ids.
        bias: [V]; -inf bans a token.
        temperature: above 0.
        softcap: cap(y) = softcap * tanh(y / softcap); None: no cap.
        vocab_size: real vocabulary where `weight` is padded; rows behind it are never read.
        banned: (rows, ids), [B] integers each: entries with probability 0.
        extras: further statistics, of "max_logprob" and "p_max" (of the likeliest token),
            "sum_p2", "sum_p3", "kept_mass" and "truncated_entropy".
        top_p, top_k, min_p: the tokens that the last two keep, as in `truncated_entropy`.
        chunk_size: rows a chunk; None: as many as are fast and cost little memory.
        backend: "auto", "cpu", "reference", or on a GPU "cuda" (rows in Triton, products by cuBLAS;
            float32 and bfloat16) or "triton" (products too). "auto" takes what can run, fastest
            first.

    bfloat16 on "cpu": the logits of a row are rounded relative to that of its target, so that
    log-probabilities err by at most 2**-8 (H - ln p(target)); "reference" widens everything.

    Raises `ValueError` for arguments that do not fit and for a backend that cannot run here;
    `NonFiniteError`, on a CPU, for a token whose logits are not finite; on a GPU its row is NaN,
    and `TokenStats.check` raises.
    """
    weight = autocast_head(hidden, weight)
    check_head(hidden, weight, targets, bias, temperature, softcap, vocab_size, banned, chunk_size)
    for extra in extras:
        if extra not in EXTRAS:
            allowed = ", ".join(EXTRAS)
            raise ValueError(
                f"extras: got {extra!r}, allowed are {allowed}.{suggest(str(extra), EXTRAS)}"
            )
    cut = Cut(top_p, top_k, min_p)
    if bool(cut) != bool({"kept_mass", "truncated_entropy"} & set(extras)):
        raise ValueError(
            "extras: 'kept_mass' and 'truncated_entropy' are of the tokens that top_p, top_k or "
            f"min_p keep; got {tuple(extras)} with {cut}"
        )
    check_cut(cut)
    chosen = choose_backend("linear_token_stats", backend, REFUSALS, hidden)
    rows, ids = (None, None) if banned is None else banned
    logprob, entropy, further, _ = token_stats(
        hidden,
        weight,
        targets,
        bias,
        float(temperature),
        softcap,
        len(weight) if vocab_size is None else vocab_size,
        rows,
        ids,
        " ".join(extras),
        chunk_size,
        chosen,
        *cut,
    )
    named = dict(zip(extras, further.unbind(0), strict=True))
    return TokenStats(logprob=logprob, entropy=entropy, extras=named)


def autocast_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the weight in the dtype of `hidden` where autocast would round it for a product."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return weight
    kind = hidden.device.type
    if hidden.dtype != weight.dtype and torch.is_autocast_enabled(kind):
        return weight.to(hidden.dtype) if hidden.dtype == torch.get_autocast_dtype(kind) else weight
    return weight


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
    banned: tuple[Tensor, Tensor] | None,
    chunk_size: int | None,
) -> None:
    """Raise `ValueError` unless the arguments describe an LM head; looks at no values."""
    check_tensor("hidden", hidden, ["N", "H"], FLOATS)
    (rows, width), device = hidden.shape, hidden.device
    check_tensor("targets", targets, [rows], INTEGERS, device)
    check_tensor("weight", weight, ["V", width], [hidden.dtype], device)
    if bias is not None:
        check_tensor("bias", bias, [len(weight)], FLOATS, device)
    if not width:
        raise ValueError("hidden: got shape [N, 0], allowed is a width of 1 or more")
    check_positive("temperature", temperature)
    check_positive("softcap", softcap, optional=True)
    if not len(weight):
        raise ValueError("weight: got an empty vocabulary, allowed is one row or more")
    if vocab_size is not None:
        check_integer("vocab_size", vocab_size, f"1 to {len(weight)} (weight)", 1, len(weight))
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, "1 or more rows, or None", 1)
    if banned is not None:
        if not isinstance(banned, (tuple, list)) or len(banned) != 2:
            what = (
                f"{len(banned)} items"
                if isinstance(banned, (tuple, list))
                else type(banned).__name__
            )
            raise ValueError(f"banned: got {what}, allowed is a pair (rows, ids)")
        check_tensor("banned rows", banned[0], ["B"], INTEGERS, device)
        check_tensor("banned ids", banned[1], list(banned[0].shape), INTEGERS, device)
