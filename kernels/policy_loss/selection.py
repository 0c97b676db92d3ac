"""Selected tokens: which ones a recipe picks from a batch, and what their loss becomes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eapo_fast.kernels.policy_loss.draws import fingerprints, keyed_uniform
from eapo_fast.kernels.policy_loss.rows import Rows
from eapo_fast.kernels.policy_loss.surrogate import Surrogate, kl_estimate
from eapo_fast.recipes import Selection

_OUTSIDE = -1e4
"""Log-probability under the proxy of a token that it does not keep."""


def select(
    rows: Rows, selection: Selection, logprob: Tensor, found: Surrogate
) -> dict[str, Tensor]:
    """Pick tokens from the whole batch `rows`: [n] each of "score", "eligible" and "selected".

    "picked" is there where not every picked token is selected (kl_to_proxy: only those below q).
    """
    score = token_score(rows, selection.score, logprob)
    pool = torch.ones_like(found.low) if rows.live is None else rows.live
    if selection.sign is not None:
        signed = rows.advantages < 0 if selection.sign == "negative" else rows.advantages > 0
        pool = pool & signed
    eligible = pool
    if selection.low is not None:
        eligible = eligible & (score > selection.low)
    if selection.high is not None:
        eligible = eligible & (score < selection.high)
    if selection.skip_clipped:
        eligible = eligible & ~(found.low | found.high)
    count = (pool.sum().double() * selection.fraction).floor().clamp(min=1)
    picked = _picked(rows, selection, score, eligible, count * (count >= selection.minimum))
    decided = {"score": score, "eligible": eligible, "selected": picked}
    if selection.effect == "kl_to_proxy":
        below = logprob < proxy_logprob(rows, selection)
        decided |= {"picked": picked, "selected": picked & below}
    return decided


def token_score(rows: Rows, score: str, logprob: Tensor) -> Tensor:
    """Return the score [n]; covariance is (A - mean A)(l - mean l), means over the batch.

    Tokens of probability 0 don't enter the mean of l.
    """
    if score == "logprob":
        return logprob
    mean_a = rows.mean(rows.advantages).to(logprob.dtype)
    possible = logprob > -torch.inf
    if rows.live is not None:
        possible = possible & rows.live
    total = torch.where(possible, logprob, 0.0).double().sum()
    mean_l = (total / possible.sum()).to(logprob.dtype)
    return (rows.advantages - mean_a) * (logprob - mean_l)


def apply_selection(
    rows: Rows, selection: Selection, logprob: Tensor, found: Surrogate
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return L, dL/dx and what comes to dL/dl beside it [n], for rows that know their "selected".

    Clip-Cov (arXiv 2505.22617): 0. KL-Cov (same): -A r + coef |d|. Lp-Reg (arXiv 2510.03222):
    -A r + coef (exp(q - l) - (q - l) - 1).
    """
    selected = rows.row_statistic("selected")
    if selection.effect == "drop":
        return torch.where(selected, 0.0, found.loss), torch.where(selected, 0.0, found.slope), None
    to = rows.old_logprob
    if selection.effect == "kl_to_proxy":
        to = proxy_logprob(rows, selection)
    kl, kl_slope = kl_estimate(selection.kl, logprob - to)
    plain = -rows.advantages * found.ratio
    return (
        torch.where(selected, plain + selection.coef * kl, found.loss),
        torch.where(selected, plain * found.moves, found.slope),
        torch.where(selected, selection.coef * kl_slope, 0.0),
    )


def proxy_logprob(rows: Rows, selection: Selection) -> Tensor:
    """Return q [n] of Lp-Reg (arXiv 2510.03222): o renormalised over p_old >= min_p max p_old.

    `kept_mass` is the old mass of those tokens. A token that is not among them has q = -1e4.
    """
    old = rows.old_logprob
    floor = math.log(selection.min_p) if selection.min_p else -math.inf
    kept = old >= rows.row_statistic("max_logprob") + floor
    return torch.where(kept, old - rows.row_statistic("kept_mass").log(), _OUTSIDE)


def _picked(
    rows: Rows, selection: Selection, score: Tensor, eligible: Tensor, count: Tensor
) -> Tensor:
    """Flag the first `count` eligible rows by score or by draw; [n].

    On a GPU all rows are ranked, and the eligible ones come first then: nobody waits for a number.
    """
    waits = rows.live is None and eligible.device.type == "cpu"
    sequences = len(rows.lengths)
    position = rows.position()
    rollout = fingerprints(rows.old_logprob, position, rows.sequence, sequences, rows.live)
    place = torch.empty_like(rollout)
    place[rollout.argsort(stable=True)] = torch.arange(sequences, device=place.device)
    if waits:
        chosen = eligible.nonzero().squeeze(1)
    else:
        chosen = torch.arange(len(eligible), device=eligible.device)
    chosen = chosen[place[rows.sequence[chosen]].argsort(stable=True)]
    if selection.pick == "random":
        step = rows.shared.get("step", position.new_zeros(())).long().expand(len(chosen))
        keys = (step, rollout[rows.sequence[chosen]], position[chosen])
        rank = keyed_uniform(selection.seed, "selection", keys)
    else:
        rank = score[chosen] if selection.pick == "lowest" else -score[chosen]
    first = chosen[rank.argsort(stable=True)]
    if not waits:
        first = first[(~eligible[first]).to(torch.uint8).argsort(stable=True)]
    picked = torch.zeros_like(eligible)
    picked[first] = torch.arange(len(first), device=first.device) < count
    return picked & eligible
