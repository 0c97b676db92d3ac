"""Evaluation: the policy alone (solo), or with consults allowed (assisted)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eapo_fast.engine import Sampler, SamplingParams
from eapo_fast.experts import ConsultScheduler
from eapo_fast.reporting.stats import wilson
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts
from eapo_fast.training.scoring import Score, Scorer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rollouts and scores of one evaluation, in the order of its problems."""

    rollouts: list[Rollout]
    scores: list[Score]
    samples: int
    """Samples per problem."""

    @property
    def accuracy(self) -> float:
        """mean@n: share of correct samples (of rewards, when a problem has no gold answer)."""
        values = [s.reward if s.accuracy is None else s.accuracy for s in self.scores]
        return sum(values) / len(values)

    @property
    def problems(self) -> int:
        """Problems evaluated."""
        return len(self.rollouts) // self.samples

    def metrics(self, kind: str) -> dict[str, float]:
        """Return `eval_<kind>_*`: accuracy with its 95 % Wilson interval over problems, lengths."""
        low, high = wilson(self.accuracy * self.problems, self.problems)
        lengths = [r.num_policy_tokens for r in self.rollouts]
        cut = sum(r.finish_reason == "length" for r in self.rollouts)
        return {
            f"eval_{kind}_accuracy": self.accuracy,
            f"eval_{kind}_accuracy_low": low,
            f"eval_{kind}_accuracy_high": high,
            f"eval_{kind}_n": float(self.problems),
            f"eval_{kind}_reward": sum(s.reward for s in self.scores) / len(self.scores),
            f"eval_{kind}_consults": sum(len(r.consults) for r in self.rollouts)
            / len(self.rollouts),
            f"eval_{kind}_completions/mean_length": sum(lengths) / len(lengths),
            f"eval_{kind}_completions/clipped_ratio": cut / len(lengths),
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
    rollouts = collect_rollouts(
        sampler, prompts, params, protocol=protocol, scheduler=scheduler, step=0
    )
    scores = [
        score
        for index, row in enumerate(rows)
        for score in scorer.score(rollouts[index * params.n : (index + 1) * params.n], row)
    ]
    return Evaluation(rollouts, scores, params.n)
