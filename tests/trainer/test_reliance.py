"""Reliance against log-probabilities computed one rollout at a time by the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eapo_fast import EAPOConfig
from eapo_fast.rollout import Rollout, Segment
from eapo_fast.training.recipe import resolve_recipe
from eapo_fast.training.reliance import assisted_and_correct, reliance, without_advice
from eapo_fast.training.update import Updater

PLAN = [("policy", 5), ("expert", 7), ("policy", 4), ("notice", 3), ("policy", 6)]


def rollout(rng: np.random.Generator, index: int, plan: Any = PLAN) -> Rollout:
    segments, mask, at = [], [], 0
    for turn, (kind, size) in enumerate(plan):
        segments.append(Segment(kind, at, at + size, turn // 2))
        mask += [int(kind == "policy")] * size
        at += size
    first = int(np.flatnonzero(mask)[-1])
    return Rollout(
        prompt_ids=rng.integers(5, 200, 6).tolist(),
        token_ids=rng.integers(5, 200, at),
        loss_mask=np.array(mask, np.uint8),
        logprobs=np.zeros(at, np.float32),
        segments=segments,
        finish_reason="stop",
        group_id=0,
        sample_index=index,
        prompt_id=0,
        banned=(np.array([first], np.int32), np.array([3], np.int32)),
    )


def plain(model: Any, r: Rollout, keep: np.ndarray, temperature: float) -> torch.Tensor:
    """Log-probabilities of the kept policy tokens, with the ban applied, in float64."""
    ids = torch.tensor([[*r.prompt_ids, *r.token_ids[keep].tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double() / temperature
    where = {int(p): int(i) for p, i in zip(*r.banned, strict=True)}
    out, seen = [], len(r.prompt_ids)
    for position in np.flatnonzero(keep):
        if r.loss_mask[position]:
            row = logits[seen - 1].clone()
            if int(position) in where:
                row[where[int(position)]] = -torch.inf
            out.append(torch.log_softmax(row, 0)[int(r.token_ids[position])])
        seen += 1
    return torch.stack(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reliance_is_the_mean_gain_from_the_advice(
    make_model: Callable[..., Any], tmp_path: Any, temperature: float
) -> None:
    rng = np.random.default_rng(1)
    model = make_model(spread=0.2)
    args = EAPOConfig(output_dir=str(tmp_path), temperature=temperature, use_cpu=True)
    updater = Updater(model, args, resolve_recipe(args), lambda step: 0.0)  # type: ignore[arg-type]
    rollouts = [rollout(rng, i) for i in range(3)]
    gains = []
    for r in rollouts:
        keep = np.ones(len(r.token_ids), bool)
        with_advice = plain(model, r, keep, temperature)
        keep[5:12] = False
        gains.append(with_advice - plain(model, r, keep, temperature))
    model.train()
    got = reliance(updater, rollouts)
    assert model.training
    assert got == pytest.approx(float(torch.cat(gains).mean()), abs=1e-5)
    assert abs(got) > 1e-3
    assert np.isnan(reliance(updater, []))


def test_without_advice_keeps_policy_and_notices() -> None:
    r = rollout(np.random.default_rng(0), 0)
    alone = without_advice(r)
    assert alone.token_ids.tolist() == [*r.token_ids[:5].tolist(), *r.token_ids[12:].tolist()]
    assert alone.loss_mask.tolist() == [1] * 5 + [1] * 4 + [0] * 3 + [1] * 6
    assert alone.banned[0].tolist() == [r.banned[0][0] - 7]


def test_only_correct_assisted_rollouts_count() -> None:
    rng = np.random.default_rng(0)
    helped = [rollout(rng, i) for i in range(4)]
    alone = rollout(rng, 4, [("policy", 5), ("notice", 2), ("policy", 2)])
    chosen = assisted_and_correct([*helped, alone], [1.0, 0.0, None, 1.0, 1.0], 8)
    assert [r.sample_index for r in chosen] == [0, 3]
    assert len(assisted_and_correct(helped, [1.0] * 4, 2)) == 2
