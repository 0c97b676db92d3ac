"""Rewards of prompt groups, scored in the background while other rollouts still decode."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from eapo_fast import rewards
from eapo_fast.engine import Vocabulary
from eapo_fast.errors import ConfigError, EapoError
from eapo_fast.rollout import Rollout

RewardFunction = Callable[..., Any]
_T = TypeVar("_T")
_SHARED = ("trainer_state", "log_extra", "log_metric")
"""Keywords that are not one value per rollout."""


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
    """1 or 0 by `rewards.verify` (undecided is 0); None without a gold answer."""
    text: str
    """Policy text."""
    final_turn: str
    """Policy text after the last reply."""
    undecided: bool = False
    """Whether `rewards.verify` could not decide."""


class Scorer:
    """Calls TRL-style reward functions in the background, one prompt group at a time.

    With `rewards.in_process(function, workers=n)` n groups are scored at once; functions of this
    process are still called one at a time.

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
        self._turn = threading.Lock()

    def submit(self, group: Sequence[Rollout], row: Mapping[str, Any]) -> Future[list[Score]]:
        """Score a complete prompt group in the background."""
        if self._pool is None:
            threads = max(getattr(function, "workers", 1) for function in self.functions)
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="eapo-reward")
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
        columns = _run(self._columns(keywords, group))
        verdicts = [self._verdict(final, row) for final in finals]
        return [
            self._joined([c[i] for c in columns], verdicts[i], texts[i], finals[i])
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

    async def _columns(
        self, keywords: dict[str, Any], group: Sequence[Rollout]
    ) -> list[list[float | None]]:
        """Call every function; asynchronous ones (and those in processes) run side by side."""
        calls = [
            self._call(name, function, keywords, group)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        return list(await asyncio.gather(*calls))

    async def _call(
        self,
        name: str,
        function: RewardFunction,
        keywords: dict[str, Any],
        group: Sequence[Rollout],
    ) -> list[float | None]:
        prompt = _short(keywords["prompts"][0])
        where = f"reward function {name!r} on prompt {prompt} (row {group[0].prompt_id})"
        start = time.perf_counter()
        try:
            with self._turn:
                values = function(**keywords)
            values = await values if inspect.isawaitable(values) else values
        except Exception as error:
            culprit = await _culprit(function, keywords, group)
            raise RewardError(f"{where}{culprit} raised {type(error).__name__}: {error}") from error
        self.metrics[f"perf/reward/{name}_s"].append(time.perf_counter() - start)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or len(values) != len(group):
            got = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(
                f"{where} returned {got} values, expected one for each of {len(group)}"
            )
        return [_number(v, r, where) for v, r in zip(values, group, strict=True)]

    def _verdict(self, final_turn: str, row: Mapping[str, Any]) -> rewards.Verdict | None:
        gold = row.get("answer")
        return None if gold is None else rewards.verify(final_turn, str(gold))

    def _joined(
        self,
        values: Sequence[float | None],
        verdict: rewards.Verdict | None,
        text: str,
        final: str,
    ) -> Score:
        weighted = [w * v for w, v in zip(self.weights, values, strict=True) if v is not None]
        return Score(
            reward=math.fsum(weighted) if weighted else math.nan,
            parts=dict(zip(self.names, values, strict=True)),
            accuracy=None if verdict is None else float(verdict.correct),
            text=text,
            final_turn=final,
            undecided=verdict is not None and verdict.status == "undecided",
        )


def _number(value: Any, rollout: Rollout, where: str) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{where}, rollout {rollout.sample_index}, returned {_short(value)}, allowed is a "
            f"number or None"
        ) from error


def reward_name(function: RewardFunction) -> str:
    """Return the name of a reward function in the metrics."""
    return str(getattr(function, "__name__", type(function).__name__))


def _resolve(function: RewardFunction | str) -> RewardFunction:
    return rewards.get(function) if isinstance(function, str) else function


def _run(columns: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in another thread when this one has a loop (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(columns)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, columns).result()


async def _culprit(
    function: RewardFunction, keywords: dict[str, Any], group: Sequence[Rollout]
) -> str:
    """Name the first rollout on which the function fails when it gets that one alone."""
    for index, rollout in enumerate(group):
        single = {
            name: value[index : index + 1] if name not in _SHARED else value
            for name, value in keywords.items()
        }
        try:
            values = function(**single)
            _ = await values if inspect.isawaitable(values) else values
        except Exception:
            return f", rollout {rollout.sample_index} of {len(group)},"
    return ""


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 120 else text[:117] + "..."
