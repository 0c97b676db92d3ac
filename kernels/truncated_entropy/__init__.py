"""Entropy of a distribution that has lost its unlikely tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eapo_fast.kernels.backend import Refusal, choose_backend
from eapo_fast.kernels.checks import FLOATS, check_tensor, compute_dtype
from eapo_fast.kernels.truncated_entropy import reference

__all__ = ["TruncatedEntropy", "truncated_entropy"]

_REFUSALS: dict[str, Refusal] = {}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TruncatedEntropy:
    """R truncated distributions over V tokens."""

    kept: Tensor
    """[R, V] flags: the tokens that are left; possibly none."""
    mass: Tensor
    """[R] their probability before the cut."""
    entropy: Tensor
    """[R] entropy in nats after renormalisation, 0 for an empty set; differentiable."""


def truncated_entropy(
    logits: Tensor,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    backend: str = "auto",
) -> TruncatedEntropy:
    """Return what is left of softmax(logits) after the cuts, and its entropy.

    The kept set is a constant of the gradient in `logits`, which is `-q (ln q + entropy)` on it
    with q the renormalised probabilities, and 0 elsewhere.

    Args:
        logits: [R, V] floating point; results are float32, or float64 for float64.
        top_p: keep the likeliest tokens as long as their mass stays below it. The token that
            reaches it is left out (SIREN, arXiv 2509.25133; a nucleus sampler would keep it), so
            nothing may be left. Among equals the lower id comes first.
        top_k: of those, at most so many.
        min_p: keep tokens with at least this share of the largest probability.
        backend: "auto" or "reference".

    Raises `ValueError` for arguments that do not fit.
    """
    check_tensor("logits", logits, ["R", "V"], FLOATS)
    if logits.shape[1] == 0:
        raise ValueError("logits: got an empty vocabulary, allowed is one token or more")
    check_cut(reference.Cut(top_p, top_k, min_p))
    choose_backend("truncated_entropy", backend, _REFUSALS, logits)
    log_p = logits.to(compute_dtype(logits.dtype)).log_softmax(-1)
    kept = reference.kept_tokens(log_p.detach(), top_p=top_p, top_k=top_k, min_p=min_p)
    mass, entropy = reference.truncated_entropy(log_p, kept)
    return TruncatedEntropy(kept=kept, mass=mass.detach(), entropy=entropy)


def check_cut(cut: reference.Cut) -> None:
    """Raise `ValueError` for shares outside of [0, 1] and counts below 1."""
    for name, share in (("top_p", cut.top_p), ("min_p", cut.min_p)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share!r}, allowed is 0 to 1, or None")
    if cut.top_k is not None and not cut.top_k >= 1:
        raise ValueError(f"top_k: got {cut.top_k!r}, allowed is 1 or more, or None")
