"""Evaluation inside a training run: the policy alone (solo), or with consults (assisted)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eapo_fast.engine import Sampler, SamplingParams
from eapo_fast.evaluation.bootstrap import intervals, share_interval
from eapo_fast.evaluation.estimators import any_at_k, majority, mean_at_n, variance
from eapo_fast.evaluation.voting import answer_classes
from eapo_fast.experts import ConsultScheduler
from eapo_fast.reporting.stats import wilson
from eapo_fast.rewards import extract_answer
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts
from eapo_fast.training.scoring import Score, Scorer


@dataclass(frozen=True)
class Evaluation:
    """Rollouts and scores of one evaluation, in the order of its problems."""

    rollouts: list[Rollout]
    scores: list[Score]
    samples: int
    """Samples per problem."""

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """[P, n] 1 for a correct sample, else 0 (the reward, where a row has no gold answer)."""
        flat = [s.reward if s.accuracy is None else s.accuracy for s in self.scores]
        return np.array(flat, dtype=np.float64).reshape(-1, self.samples)

    @property
    def accuracy(self) -> float:
        """mean@n: share of correct samples (of rewards, when a problem has no gold answer)."""
        return float(self.values.mean())

    @property
    def problems(self) -> int:
        """Problems evaluated."""
        return len(self.rollouts) // self.samples

    def metrics(self, kind: str) -> dict[str, float]:
        """Return `eval_<kind>_*`: accuracy with its 95 % interval over problems, lengths.

        The interval is Wilson's for one graded sample per problem, else the bootstrap's. With
        several graded samples there are also `any_at_n`, `maj_at_n` and `var`.
        """
        low, high = self._interval()
        lengths = [r.num_policy_tokens for r in self.rollouts]
        cut = sum(r.finish_reason == "length" for r in self.rollouts)
        metrics = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "n": float(self.problems),
            "reward": sum(s.reward for s in self.scores) / len(self.scores),
            "consults": sum(len(r.consults) for r in self.rollouts) / len(self.rollouts),
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/clipped_ratio": cut / len(lengths),
        } | self._repeated()
        return {f"eval_{kind}_{name}": value for name, value in metrics.items()}

    def _interval(self) -> tuple[float, float]:
        if not self._graded():
            low, high = intervals(self.values.mean(axis=1))[0]
            return float(low), float(high)
        if self.samples == 1:
            return wilson(self.accuracy * self.problems, self.problems)
        return share_interval(mean_at_n(self.values))

    def _graded(self) -> bool:
        return all(s.accuracy is not None for s in self.scores)

    def _repeated(self) -> dict[str, float]:
        """Return what only several samples of a problem tell."""
        if self.samples == 1 or not self._graded():
            return {}
        answers = [extract_answer(s.final_turn) for s in self.scores]
        starts = range(0, len(answers), self.samples)
        votes = [
            majority(answer_classes(answers[i : i + self.samples]), [v == 1.0 for v in row])
            for i, row in zip(starts, self.values, strict=True)
        ]
        return {
            "any_at_n": float(any_at_k(self.values)[:, -1].mean()),
            "maj_at_n": sum(votes) / len(votes),
            "var": float(variance(self.values).mean()),
        }


def evaluate_rows(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    scorer: Scorer,
    *,
    protocol: ConsultProtocol | None = None,
    scheduler: ConsultScheduler | None = None,
) -> Evaluation:
    """Sample `params.n` rollouts of every problem and score them.

    The draws are keyed by step 0, so evaluations of one run use the same random numbers. Without a
    scheduler no consult is possible.
    """
    sampler.forget_prefixes()  # the result must not depend on what was sampled before, to the bit
    rollouts = collect_rollouts(
        sampler, prompts, params, protocol=protocol, scheduler=scheduler, step=0
    )
    scores = [
        score
        for index, row in enumerate(rows)
        for score in scorer.score(rollouts[index * params.n : (index + 1) * params.n], row)
    ]
    return Evaluation(rollouts, scores, params.n)
