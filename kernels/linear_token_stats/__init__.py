"""Log-probability and entropy of tokens straight from hidden states: no full-batch logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from eapo_fast.errors import suggest
from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import (
    FLOATS,
    INTEGERS,
    check_range,
    check_tensor,
)
from eapo_fast.kernels.linear_token_stats import reference
from eapo_fast.kernels.linear_token_stats.reference import EXTRAS

__all__ = ["TokenStats", "check_head", "linear_token_stats"]

_REFUSALS: dict[str, Refusal] = {}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStats:
    """Statistics of N tokens; float32, or float64 for float64 inputs."""

    logprob: Tensor
    """[N] log-probability of the target, in nats; -inf where the target is banned."""
    entropy: Tensor
    """[N] Shannon entropy of the distribution, in nats."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, detached, by the names asked for."""


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
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Return log-probability and entropy of `targets` under softmax of the LM head's logits.

    `logits = cap(hidden @ weight.T + bias) / temperature`. Differentiable once in `hidden`,
    `weight` and `bias` through both outputs. At most `chunk_size` rows of logits exist at a time.

    Args:
        hidden: [N, H] float32, float64, bfloat16 or float16.
        weight: [V, H] in the dtype of `hidden`. Products and sums are float32 (float64 for
            float64), the gradient of the weight is rounded once, after the last row.
        targets: [N] token ids.
        bias: [V]; -inf bans a token.
        temperature: above 0.
        softcap: cap(y) = softcap * tanh(y / softcap); None: no cap.
        vocab_size: real vocabulary where `weight` is padded; rows behind it are never read.
        banned: (rows, ids), [B] integers each: entries with probability 0.
        extras: further statistics, of "max_logprob" (of the likeliest token), "sum_p2", "sum_p3".
        chunk_size: rows a chunk; None: 2**25 logits.
        backend: "auto" or "reference".

    Raises `ValueError` for arguments that do not fit and for a backend that cannot run here.
    """
    check_head(hidden, weight, targets, bias, temperature, softcap, vocab_size, banned, chunk_size)
    for extra in extras:
        if extra not in EXTRAS:
            allowed = ", ".join(EXTRAS)
            raise ValueError(
                f"extras: got {extra!r}, allowed are {allowed}.{suggest(str(extra), EXTRAS)}"
            )
    choose_backend("linear_token_stats", backend, _REFUSALS, hidden)
    logprob, entropy, *rest = reference.linear_token_stats(
        hidden,
        weight,
        targets.long(),
        bias=bias,
        temperature=float(temperature),
        softcap=softcap,
        vocab_size=vocab_size or len(weight),
        banned=banned,
        extras=tuple(extras),
        chunk_size=chunk_size,
    )
    named = dict(zip(extras, rest, strict=True))
    return TokenStats(logprob=logprob, entropy=entropy, extras=named)


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
    """Raise `ValueError` unless the arguments describe an LM head and its rows."""
    check_tensor("hidden", hidden, ["N", "H"], FLOATS)
    (rows, width), device = hidden.shape, hidden.device
    check_tensor("weight", weight, ["V", width], [hidden.dtype], device)
    check_tensor("targets", targets, [rows], INTEGERS, device)
    if bias is not None:
        check_tensor("bias", bias, [len(weight)], FLOATS, device)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature!r}, allowed is a finite number above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap!r}, allowed is a number above 0, or None")
    vocab = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab <= len(weight):
        raise ValueError(f"vocab_size: got {vocab_size!r}, allowed is 1 to {len(weight)} (weight)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size!r}, allowed is 1 or more rows, or None")
    check_range("targets", targets, vocab)
    if banned is not None:
        _check_banned(banned, rows, vocab, hidden)


def _check_banned(banned: tuple[Tensor, Tensor], rows: int, vocab: int, hidden: Tensor) -> None:
    if len(banned) != 2:
        raise ValueError(f"banned: got {len(banned)} items, allowed is a pair (rows, ids)")
    check_tensor("banned rows", banned[0], ["B"], INTEGERS, hidden.device)
    check_tensor("banned ids", banned[1], list(banned[0].shape), INTEGERS, hidden.device)
    check_range("banned rows", banned[0], rows)
    check_range("banned ids", banned[1], vocab)
