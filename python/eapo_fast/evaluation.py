"""Evaluation: the policy alone (solo), or with consults allowed (assisted)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.data import encode_prompts, load_dataset, require_column
from eapo_fast.engine import Sampler, SamplingParams
from eapo_fast.experts import ConsultScheduler, Expert
from eapo_fast.reporting.stats import wilson
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts
from eapo_fast.training.scoring import Score, Scorer
from eapo_fast.training.setup import load_model, load_tokenizer


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


def evaluate_model(
    model: str | Path,
    data: str | Path,
    *,
    n: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 512,
    limit: int | None = None,
    seed: int = 0,
    expert: Expert | None = None,
) -> dict[str, float]:
    """Return the accuracy of a model on a JSONL file, alone or (with an expert) assisted.

    Args:
        model: transformers directory (or hub id) with its tokenizer.
        data: problems with gold answers.
        n: samples per problem.
        limit: first rows only; None: all.
        expert: answers every consult; None: the opening tag is banned where it can be written.

    Raises:
        DataError, ModelError: the file or the model cannot be used.
    """
    rows = load_dataset(data, name="data")[:limit]
    require_column(rows, "answer", needed_by="accuracy")
    policy = load_model(model, EAPOConfig())
    tokenizer = load_tokenizer(None, policy)
    sampler = Sampler(policy, tokenizer)
    assert sampler.vocabulary is not None
    protocol = ConsultProtocol()
    prompts = encode_prompts(
        rows, tokenizer, system=protocol.instructions() if expert is not None else None
    )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        n=n,
        seed=seed,
        stop_token_ids=(tokenizer.eos_token_id,),
    )
    scorer = Scorer(["accuracy"], None, sampler.vocabulary)
    if expert is None:
        done = evaluate_rows(sampler, prompts, rows, params, scorer, protocol=protocol)
        return done.metrics("solo")
    with ConsultScheduler(expert, seed=seed) as scheduler:
        done = evaluate_rows(
            sampler, prompts, rows, params, scorer, protocol=protocol, scheduler=scheduler
        )
    return done.metrics("assisted")
