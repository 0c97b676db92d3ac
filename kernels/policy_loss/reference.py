"""Policy losses in plain torch: from log-probabilities to a loss and the coefficients a, b and c.

Nothing here is differentiated by autograd. Notation as in `Recipe`: A, l, o, f, d = l - o, H, Ht.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.metrics import Terms, metrics_of
from eapo_fast.kernels.policy_loss.rows import LossOutput, Rows
from eapo_fast.kernels.policy_loss.selection import apply_selection, proxy_logprob
from eapo_fast.kernels.policy_loss.statistics import resolve
from eapo_fast.kernels.policy_loss.surrogate import kl_estimate, surrogate, to_tokens
from eapo_fast.recipes import EntropyBand, Recipe


def policy_loss(
    rows: Rows,
    recipe: Recipe,
    logprob: Tensor,
    entropy: Tensor | None,
    truncated: Tensor | None = None,
    *,
    details: bool = False,
) -> LossOutput:
    """Return loss, metrics and coefficients for l, H and Ht [n] of `rows`; the loss is detached."""
    logprob = logprob.detach()
    entropy = None if entropy is None else entropy.detach()
    truncated = None if truncated is None else truncated.detach()
    if recipe.entropy_target and truncated is None:
        raise ValueError(f"recipe {recipe.name!r} reads the truncated entropy, which is not here")
    rows, seen = resolve(rows, recipe, logprob, entropy, truncated)
    terms = token_terms(rows, recipe, logprob, entropy)
    loss = rows.counted(rows.weight * terms.loss).sum() + _target_loss(rows, recipe)
    b = torch.zeros_like(terms.a) if terms.b is None else terms.b
    return LossOutput(
        loss=loss,
        metrics=metrics_of(rows, recipe, terms, logprob, entropy, truncated),
        a=rows.scatter(terms.a),
        b=rows.scatter(b),
        c=None if terms.c is None else rows.scatter(terms.c),
        token_loss=rows.scatter(terms.loss),
        details=_details(rows, recipe, terms, entropy, seen) if details else {},
    )


def token_terms(rows: Rows, recipe: Recipe, logprob: Tensor, entropy: Tensor | None) -> Terms:
    """Evaluate `recipe` on l [n] and H [n].

    Rows of a token-local recipe may be any (`Rows.part`), and so may rows that `resolve` has given
    their batch statistics; a sequence-level recipe needs whole sequences. Without `resolve` the
    penalty of an entropy band is left out of the loss; a, b and c do not depend on it.
    """
    found = surrogate(rows, recipe, logprob)
    loss, slope, direct = found.loss, found.slope, None
    if recipe.selection:
        loss, slope, direct = apply_selection(rows, recipe.selection, logprob, found)
    for factor in _factors(rows, recipe):
        loss, slope = loss * factor, slope * factor
        direct = None if direct is None else direct * factor
    a = to_tokens(rows, recipe, rows.weight * slope, found)
    if direct is not None:
        a = a + rows.weight * direct
    kl = None
    if rows.ref_logprob is not None:
        kl, kl_slope = kl_estimate(recipe.kl, logprob - rows.ref_logprob)
        if recipe.beta > 0:
            loss = loss + recipe.beta * kl
            a = a + rows.weight * (recipe.beta * kl_slope)
    b, penalty = None, None
    if recipe.entropy_coef and entropy is not None:
        bonus = entropy
        middle = _entropy_mean(rows)
        if recipe.entropy_band is not None and middle is not None:
            penalty = band_penalty(rows, recipe.entropy_band, entropy, middle)
            bonus = bonus - recipe.entropy_band.coef * rows.shared.get("smoothing", 1.0) * penalty
        loss = loss - recipe.entropy_coef * bonus
        b = -recipe.entropy_coef * rows.weight
    c = None
    if recipe.entropy_target:
        pull = 2 * recipe.entropy_target.coef * rows.shared_statistic("entropy_gap")
        c = pull * rows.row_statistic("entropy_share")
    return Terms(loss=loss, a=a, b=b, c=c, surrogate=found, kl=kl, penalty=penalty)


def band_penalty(rows: Rows, band: EntropyBand, entropy: Tensor, middle: Tensor) -> Tensor:
    """Return P [n] of EPO (arXiv 2509.22576): 0 strictly inside the band around Hbar `middle`."""
    level = band_level(rows, band, entropy)
    inside = (band.low * middle < level) & (level < band.high * middle)
    return (~inside).to(entropy.dtype) * band.penalty


def band_level(rows: Rows, band: EntropyBand, entropy: Tensor) -> Tensor:
    """Return [n] what has to lie in the band: H, or the mean of H over the sequence."""
    if band.level == "token":
        return entropy
    total = rows.sequence_sum(entropy)
    return total / (rows.lengths[rows.sequence] if band.width is None else band.width)


def _entropy_mean(rows: Rows) -> Tensor | None:
    return rows.stats.get("entropy_mean", rows.shared.get("entropy_mean"))


def _factors(rows: Rows, recipe: Recipe) -> list[Tensor]:
    factors = [] if rows.factor is None else [rows.factor]
    return factors + ([rows.row_statistic("reweighting")] if recipe.reweighting else [])


def _target_loss(rows: Rows, recipe: Recipe) -> Tensor | float:
    """Return these rows' part, by tokens, of coef (L_H - anchor)^2."""
    if recipe.entropy_target is None:
        return 0.0
    gap = rows.shared_statistic("entropy_gap")
    return recipe.entropy_target.coef * gap.square() * (rows.count / rows.num_tokens)


def _details(
    rows: Rows,
    recipe: Recipe,
    terms: Terms,
    entropy: Tensor | None,
    seen: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Spread over [N] what the recipe saw and decided."""
    found = terms.surrogate
    named = {
        "ratio": found.ratio,
        "clipped_low": found.low,
        "clipped_high": found.high,
        "clipped_dual": found.dual,
        "kl": terms.kl,
        "entropy_penalty": terms.penalty,
        "selected": rows.stats.get("selected"),
        "reweighting": rows.stats.get("reweighting"),
        **seen,
    }
    if recipe.selection and recipe.selection.effect == "kl_to_proxy":
        named["proxy_logprob"] = proxy_logprob(rows, recipe.selection)
    middle = _entropy_mean(rows)
    if recipe.entropy_band and entropy is not None and middle is not None:
        named["entropy_level"] = band_level(rows, recipe.entropy_band, entropy)
        named["entropy_mean"] = middle.expand(len(rows.sequence))
    return {name: rows.scatter(values) for name, values in named.items() if values is not None}
