"""Rewards of prompt groups, scored in the background while other rollouts still decode."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from eapo_fast import rewards
from eapo_fast.engine import Vocabulary
from eapo_fast.errors import ConfigError, EapoError
from eapo_fast.rollout import Rollout

RewardFunction = Callable[..., Any]


class RewardError(EapoError, RuntimeError):
    """A user's reward function raised or returned something else than one value per rollout."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one rollout earned."""

    reward: float
    """Weighted sum; NaN when no function applied to the row."""
    parts: dict[str, float | None]
    """Value of each reward function; None: does not apply."""
    accuracy: float | None
    """1 or 0 by `rewards.verify`; None without a gold answer."""
    text: str
    """Policy text."""
    final_turn: str
    """Policy text after the last reply."""


class Scorer:
    """Calls TRL-style reward functions, one prompt group at a time, in one background thread.

    Args:
        functions: reward functions (or names in `eapo_fast.rewards`).
        weights: one per function; None: all 1.
        vocabulary: decodes policy tokens.
        trainer_state: handed to the functions.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str],
        weights: Sequence[float] | None,
        vocabulary: Vocabulary,
        trainer_state: Any = None,
    ) -> None:
        self.functions = [_resolve(f) for f in functions]
        self.names = [reward_name(f) for f in self.functions]
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ConfigError(
                f"reward_weights: got {len(self.weights)} values for {len(self.functions)} reward "
                f"functions ({', '.join(self.names)}); give one each"
            )
        self.vocabulary = vocabulary
        self.trainer_state = trainer_state
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, group: Sequence[Rollout], row: Mapping[str, Any]) -> Future[list[Score]]:
        """Score a complete prompt group in the background."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eapo-reward")
        return self._pool.submit(self.score, group, row)

    def score(self, group: Sequence[Rollout], row: Mapping[str, Any]) -> list[Score]:
        """Score a prompt group.

        Args:
            group: rollouts of one prompt.
            row: data set row of that prompt; its columns reach the functions.

        Raises:
            RewardError: a function raised or returned the wrong number of values.
        """
        texts = [r.policy_text(self.vocabulary.plain_text) for r in group]
        finals = [r.final_turn(self.vocabulary.plain_text) for r in group]
        keywords = self._keywords(group, row, texts, finals)
        columns = [
            self._call(name, function, keywords, len(group))
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        accuracies = [self._accuracy(final, row) for final in finals]
        return [
            self._joined([c[i] for c in columns], accuracies[i], texts[i], finals[i])
            for i in range(len(group))
        ]

    def close(self) -> None:
        """End the background thread; `submit` starts another."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _keywords(
        self, group: Sequence[Rollout], row: Mapping[str, Any], texts: list[str], finals: list[str]
    ) -> dict[str, Any]:
        n = len(group)
        chat = isinstance(row["prompt"], list)
        completions = [[{"role": "assistant", "content": t}] if chat else t for t in texts]
        return {name: [value] * n for name, value in row.items() if name != "prompt"} | {
            "prompts": [row["prompt"]] * n,
            "completions": completions,
            "completion_ids": [r.ids() for r in group],
            "final_turns": finals,
            "rollouts": list(group),
            "trainer_state": self.trainer_state,
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
        }

    def _call(
        self, name: str, function: RewardFunction, keywords: dict[str, Any], n: int
    ) -> list[float | None]:
        where = f"reward function {name!r} on prompt {_short(keywords['prompts'][0])}"
        try:
            values = function(**keywords)
            if inspect.isawaitable(values):
                values = asyncio.run(_awaited(values))
        except Exception as error:
            raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or len(values) != n:
            got = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(f"{where} returned {got} values, expected one for each of {n}")
        return [None if v is None else float(v) for v in values]

    def _accuracy(self, final_turn: str, row: Mapping[str, Any]) -> float | None:
        gold = row.get("answer")
        if gold is None:
            return None
        return float(rewards.verify(final_turn, str(gold)).status == "correct")

    def _joined(
        self, values: Sequence[float | None], accuracy: float | None, text: str, final: str
    ) -> Score:
        weighted = [w * v for w, v in zip(self.weights, values, strict=True) if v is not None]
        total = math.fsum(weighted) if weighted else math.nan
        return Score(total, dict(zip(self.names, values, strict=True)), accuracy, text, final)


def reward_name(function: RewardFunction) -> str:
    """Return the name of a reward function in the metrics."""
    return str(getattr(function, "__name__", type(function).__name__))


def _resolve(function: RewardFunction | str) -> RewardFunction:
    return rewards.get(function) if isinstance(function, str) else function


async def _awaited(value: Any) -> Any:
    return await value


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 120 else text[:117] + "..."
