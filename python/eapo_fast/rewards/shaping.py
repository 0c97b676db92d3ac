"""Rewards beside correctness: length, consult cost, token F1."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.rewards.extract import boxed, extract_gold
from eapo_fast.rewards.functions import (
    WELL_FORMED,
    Rewards,
    accuracy,
    gold_answers,
    is_well_formed,
    policy_texts,
)
from eapo_fast.rewards.texts import normal_text

RewardFunction = Callable[..., Rewards]
Counted = Literal["accepted", "asked"]
_ACCEPTED = frozenset(("ok", "cached"))
_DROPPED = str.maketrans("", "", string.punctuation)


def overlong(max_length: int = 20480, buffer: int = 4096, *, factor: float = 1.0) -> RewardFunction:
    """Make DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4).

    `min(-(length - (max_length - buffer)) / buffer * factor, 0)` per completion, where `length` is
    the number of policy tokens: 0 up to `max_length - buffer`, then linearly down to `-factor` at
    `max_length`. Beyond it the line goes on (as in DAPO's code; the paper stays at -1).

    Args:
        max_length: L_max in tokens, usually `max_completion_length`.
        buffer: L_buf, tokens of the soft zone below `max_length`.
        factor: Punishment at `max_length`.

    Raises:
        ConfigError: `buffer` is not between 1 and `max_length`.
    """
    if not 1 <= buffer <= max_length:
        raise ConfigError(f"overlong: buffer got {buffer}, allowed is 1 to max_length {max_length}")

    def overlong(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> Rewards:
        free = max_length - buffer
        return [min(-(n - free) / buffer * factor, 0.0) for n in _lengths(completion_ids, columns)]

    return overlong


def consult_cost(price: float = 0.1, *, counted: Counted = "accepted") -> RewardFunction:
    """Make an additive price of `-price` per consult, to be summed with a correctness reward.

    Args:
        price: lambda, the cost of one consult.
        counted: `accepted` counts replies that reached the policy, `asked` every query written,
            declined ones too.

    Raises:
        ConfigError: `price` is negative or `counted` unknown.
    """
    if price < 0:
        raise ConfigError(f"consult_cost: price got {price}, allowed is 0 or more")
    _check_counted(counted)

    def consult_cost(*, completions: Sequence[Any], **columns: Any) -> Rewards:
        return [0.0 - price * calls for calls in _consults(columns, counted)]

    return consult_cost


def consult_discount(
    factor: float = 0.7,
    *,
    counted: Counted = "accepted",
    correctness: RewardFunction = accuracy,
) -> RewardFunction:
    """Make a multiplicative consult cost on correct rollouts only (MASH, arXiv 2510.01152).

    A correct rollout with n consults gets `factor ** (n - n_min) - 1`, where n_min is the fewest
    among the correct rollouts of its group; a wrong one gets 0. Added to a correctness reward of
    1 that makes `factor ** (n - n_min)`. Groups are `rollouts[i].group_id`, else runs of equal
    prompts.

    Args:
        factor: lambda, in (0, 1].
        counted: See `consult_cost`.
        correctness: Reward function whose 1.0 means correct.

    Raises:
        ConfigError: `factor` or `counted` out of range.
    """
    if not 0 < factor <= 1:
        raise ConfigError(f"consult_discount: factor got {factor}, allowed is above 0 up to 1")
    _check_counted(counted)

    def consult_discount(*, completions: Sequence[Any], **columns: Any) -> Rewards:
        correct = [r == 1.0 for r in correctness(completions=completions, **columns)]
        calls, groups = _consults(columns, counted), _groups(columns, len(completions))
        fewest: dict[Any, int] = {}
        for group, n, right in zip(groups, calls, correct, strict=True):
            if right:
                fewest[group] = min(n, fewest.get(group, n))
        return [
            factor ** (n - fewest[group]) - 1.0 if right else 0.0
            for group, n, right in zip(groups, calls, correct, strict=True)
        ]

    return consult_discount


def paper_f1(*, completions: Sequence[Any], **columns: Any) -> Rewards:
    """EAPO's published reward: token F1 of the boxed answer, 0.1 for a bare well-formed box, or 0.

    `R = F1` if F1 > 0, else 0.1 if the box is well-formed, else 0 (arXiv 2509.23730; the token F1
    is ReSearch's, arXiv 2503.19470: lower case, without punctuation and articles).

    Dropping punctuation misreads mathematics: "-5" equals "5", "1/2" becomes "12", and a list in
    the box scores ("12 34" against "34" is 0.667). Prefer `exact`, which is the same on clean
    integer answers.
    """
    texts = policy_texts(completions, columns.get("final_turns"))
    golds = gold_answers(columns, len(texts), "paper_f1")
    return [
        None if gold is None else _boxed_f1(text, gold)
        for text, gold in zip(texts, golds, strict=True)
    ]


def token_f1(prediction: str, gold: str) -> float:
    """Return the F1 of the multisets of normalised tokens (SQuAD's), 0 if one is empty."""
    left, right = _tokens(prediction), _tokens(gold)
    closed = {"yes", "no", "noanswer"}
    if left != right and any(len(side) == 1 and side[0] in closed for side in (left, right)):
        return 0.0
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0


def _boxed_f1(text: str, gold: str) -> float:
    if not is_well_formed(text):
        return 0.0
    return token_f1(boxed(text) or "", extract_gold(gold) or "") or WELL_FORMED


def _tokens(text: str) -> list[str]:
    return normal_text(text.translate(_DROPPED)).split()


def _lengths(completion_ids: Sequence[Sequence[int]], columns: dict[str, Any]) -> list[int]:
    """Return policy tokens per rollout: injected text of a rollout does not count."""
    rollouts = columns.get("rollouts")
    masks = [getattr(rollout, "loss_mask", None) for rollout in rollouts or ()]
    if masks and all(mask is not None for mask in masks):
        return [int(sum(mask)) for mask in masks if mask is not None]
    return [len(ids) for ids in completion_ids]


def _consults(columns: dict[str, Any], counted: Counted) -> list[int]:
    rollouts = columns.get("rollouts")
    if rollouts is None:
        raise DataError("a consult cost needs 'rollouts', which eapo_fast's trainer passes")
    return [
        sum(counted == "asked" or consult.status in _ACCEPTED for consult in rollout.consults)
        for rollout in rollouts
    ]


def _groups(columns: dict[str, Any], count: int) -> list[Any]:
    rollouts = columns.get("rollouts")
    if rollouts is not None and all(hasattr(rollout, "group_id") for rollout in rollouts):
        return [rollout.group_id for rollout in rollouts]
    prompts, groups = columns.get("prompts") or [None] * count, [0]
    for before, prompt in pairwise(prompts):
        groups.append(groups[-1] + (prompt != before))
    return list(groups)


def _check_counted(counted: str) -> None:
    if counted not in ("accepted", "asked"):
        raise ConfigError(f"counted: got {counted!r}, allowed is accepted or asked")
