"""One continuous-batching run: plan, forward, sample, commit, until nothing is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eapo_fast import _core
from eapo_fast.engine.forward import PagedForward
from eapo_fast.engine.params import SamplerConfig, SamplingParams
from eapo_fast.engine.pool import Pool
from eapo_fast.engine.transfer import download, upload
from eapo_fast.engine.vocabulary import patterns
from eapo_fast.kernels.sample import Draws, sample

_SETTINGS = (
    "sample_rows",
    "uniforms",
    "temperatures",
    "top_ks",
    "top_ps",
    "min_ps",
    "ban_rows",
    "ban_ids",
)
"""What a plan says about its draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What ends, parks or bans while a row is sampled."""

    stop_token_ids: Sequence[int] = ()
    """Tokens that end the row."""
    stop: Sequence[str] = ()
    """Strings that end the row."""
    park: Sequence[str] = ()
    """Strings that take the row out of the batch until tokens are injected."""
    banned_token_ids: Sequence[int] = ()
    """Tokens that are never sampled."""
    banned_strings: Sequence[str] = ()
    """Strings whose completing token is never sampled."""


@dataclass(frozen=True, slots=True)
class Row:
    """All that was sampled and injected after a prompt."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    """0 where the mask is 0."""
    kept_mass: NDArray[np.float32]
    mask: NDArray[np.uint8]
    """1 exactly on sampled tokens."""
    ban_positions: NDArray[np.int32]
    """Positions (indices of token_ids) at which `ban_ids` had probability 0."""
    ban_ids: NDArray[np.int32]
    finish_reason: str
    """Empty while the row is unfinished."""


class Session:
    """Rows that are decoded together over one KV pool.

    Args:
        device: where the model is.
        pool: KV pool; nobody else may use it while the session runs.
        token_bytes: bytes of every token, empty ones when no strings are matched.
        config: engine shape.
        max_context: most tokens of a sequence.
        forward: runs the model on the tokens of a plan.
    """

    def __init__(
        self,
        device: torch.device,
        pool: Pool,
        token_bytes: Any,
        *,
        config: SamplerConfig,
        max_context: int,
        forward: PagedForward,
    ) -> None:
        self._cache = pool.cache
        self._device = device
        self._forward = forward
        self.scheduler = _core.Scheduler(
            pool.blocks,
            token_bytes,
            max_batch=config.max_batch,
            max_step_tokens=config.max_batch + config.max_prefill_tokens,
            max_context=max_context,
            prefix_cache=config.prefix_cache,
        )
        self._rules: dict[Rules, int] = {}
        self._speed = _PrefillSpeed()
        self.pinned_rate = False
        self._believed = 0.0
        self.unfinished: set[int] = set()

    def rules(self, rules: Rules) -> int:
        """Return the scheduler's handle of `rules`.

        Of one string in several places the ban counts first, then the stop.
        """
        if rules not in self._rules:
            banned = dict.fromkeys(rules.banned_strings)
            stop = [text for text in dict.fromkeys(rules.stop) if text not in banned]
            park = [text for text in dict.fromkeys(rules.park) if text not in {*banned, *stop}]
            self._rules[rules] = self.scheduler.add_rules(
                list(rules.stop_token_ids),
                patterns(stop),
                patterns(park),
                list(rules.banned_token_ids),
                patterns(list(banned)),
            )
        return self._rules[rules]

    def add_group(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        rules: Rules,
        *,
        prompt_id: int,
        step: int,
    ) -> list[int]:
        """Queue `params.n` rows that share one prompt; returns their sequence ids in order."""
        ids = self.scheduler.add_group(
            list(prompt),
            params.n,
            self.rules(rules),
            params.max_tokens,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            step,
            prompt_id,
            list(params.temperature_schedule),
        )
        self.unfinished.update(ids)
        return list(ids)

    def step(self) -> list[Any] | None:
        """Run one forward; returns its events, or None when no row can run now."""
        start = time.perf_counter()
        plan = self.scheduler.plan()
        if plan is None:
            return None
        self._move_blocks(plan)
        tokens, logprobs, kept = self._sample(plan, self._forward(plan))
        events = self.scheduler.commit(*download((tokens, logprobs.float(), kept.float())))
        self.unfinished.difference_update(e.seq for e in events if e.kind == "finished")
        seen = self._speed.saw(len(plan.input_ids), len(plan.seqs), time.perf_counter() - start)
        if seen and not self.pinned_rate:
            self.believe_rate(self.prefill_rate)
        return list(events)

    @property
    def prefill_rate(self) -> float:
        """Tokens a second of steps that mostly prefill, as measured; 0 before any."""
        return self._speed.tokens_per_second

    def believe_rate(self, tokens_per_second: float) -> None:
        """Say how fast dropped KV is computed again; a replay pins what the recorded run believed.

        With `pinned_rate` set, this is the only way in which the rate changes.
        """
        if tokens_per_second != self._believed:
            self._believed = tokens_per_second
            self.scheduler.set_prefill_rate(tokens_per_second)

    def inject(self, seq: int, ids: Sequence[int]) -> bool:
        """Append foreign tokens to a parked row; False when that ended it ("length")."""
        runnable = bool(self.scheduler.inject(seq, list(ids)))
        if not runnable:
            self.unfinished.discard(seq)
        return runnable

    def expect_wait(self, seq: int, seconds: float) -> None:
        """Say when a parked row may go on; long waits give their blocks away first."""
        self.scheduler.expect_wait(seq, seconds)

    def set_rules(self, seq: int, rules: Rules) -> None:
        """Change what ends, parks or bans from the row's next token on."""
        self.scheduler.set_rules(seq, self.rules(rules))

    def finish(self, seq: int, reason: str) -> None:
        """End a row from outside."""
        self.scheduler.finish(seq, reason)
        self.unfinished.discard(seq)

    def row(self, seq: int) -> Row:
        """Return what a row holds so far."""
        return Row(**self.scheduler.tokens(seq))

    def release(self, seq: int) -> None:
        """Forget a row and free its blocks."""
        self.unfinished.discard(seq)
        self.scheduler.release(seq)

    def _sample(self, plan: Any, logits: Tensor) -> Draws:
        sent = upload([getattr(plan, name) for name in _SETTINGS], self._device)
        given: dict[str, Any] = dict(zip(_SETTINGS, sent, strict=True))
        banned = given.pop("ban_rows"), given.pop("ban_ids")
        return sample(logits, rows=given.pop("sample_rows"), **given, banned=banned)

    def _move_blocks(self, plan: Any) -> None:
        """Bring the blocks to where the step expects them, in this order."""
        for pairs, move in (
            (plan.swap_out, self._cache.swap_out),
            (plan.swap_in, self._cache.swap_in),
        ):
            if len(pairs):
                move(torch.from_numpy(pairs))
        if len(plan.copies):
            self._cache.copy(self._on_device(plan.copies))

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class _PrefillSpeed:
    """Tokens per second of steps that mostly prefill: what dropped KV costs to compute again."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0

    def saw(self, tokens: int, rows: int, seconds: float) -> bool:
        """Take in a step; returns whether it told anything."""
        if tokens < 2 * rows or seconds <= 0.0:
            return False
        now, before = tokens / seconds, self.tokens_per_second
        self.tokens_per_second = before + (now - before) / 4 if before else now
        return True
