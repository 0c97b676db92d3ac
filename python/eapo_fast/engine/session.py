"""One continuous-batching run: plan, forward, sample, commit, until nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast import _core
from eapo_fast.engine.attention import PagedStep, paged_forward
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.params import SamplingParams
from eapo_fast.engine.vocabulary import Vocabulary, patterns
from eapo_fast.kernels.sample import sample


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
        model: causal LM in eval mode; its parameters are used as they are.
        cache: KV tensors; nobody else may use them while the session runs.
        pool: the bookkeeping of their blocks.
        vocabulary: token bytes, or None when no strings are matched.
        max_batch: rows decoded at once.
        max_prefill_tokens: prompt and injected tokens of one step.
        max_context: most tokens of a sequence.
        vocab_size: rows of the LM head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        pool: _core.KvPool,
        vocabulary: Vocabulary | None,
        *,
        max_batch: int,
        max_prefill_tokens: int,
        max_context: int,
        vocab_size: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._device = model.device
        token_bytes = vocabulary.token_bytes if vocabulary else [b""] * vocab_size
        self.scheduler = _core.Scheduler(
            pool,
            _core.Vocabulary(token_bytes),
            max_batch=max_batch,
            max_step_tokens=max_batch + max_prefill_tokens,
            max_context=max_context,
        )
        self._rules: dict[Rules, int] = {}
        self.unfinished: set[int] = set()

    def rules(self, rules: Rules) -> int:
        """Return the scheduler's handle of `rules`."""
        if rules not in self._rules:
            self._rules[rules] = self.scheduler.add_rules(
                list(rules.stop_token_ids),
                patterns(rules.stop),
                patterns(rules.park),
                list(rules.banned_token_ids),
                patterns(rules.banned_strings),
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
        )
        self.unfinished.update(ids)
        return list(ids)

    def step(self) -> list[Any] | None:
        """Run one forward; returns its events, or None when no row can run now."""
        plan = self.scheduler.plan()
        if plan is None:
            return None
        logits = self._forward(plan)
        tokens, logprobs, kept = sample(
            logits,
            rows=self._on_device(plan.sample_rows),
            uniforms=self._on_device(plan.uniforms),
            temperatures=self._on_device(plan.temperatures),
            top_ks=self._on_device(plan.top_ks),
            top_ps=self._on_device(plan.top_ps),
            min_ps=self._on_device(plan.min_ps),
            banned=(self._on_device(plan.ban_rows), self._on_device(plan.ban_ids)),
        )
        events = self.scheduler.commit(
            tokens.cpu().numpy(), logprobs.cpu().numpy(), kept.cpu().numpy()
        )
        self.unfinished.difference_update(e.seq for e in events if e.kind == "finished")
        return list(events)

    def inject(self, seq: int, ids: Sequence[int]) -> bool:
        """Append foreign tokens to a parked row; False when that ended it ("length")."""
        runnable = bool(self.scheduler.inject(seq, list(ids)))
        if not runnable:
            self.unfinished.discard(seq)
        return runnable

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

    def _forward(self, plan: Any) -> Tensor:
        """Return logits [L, V] of the rows that sample in this step."""
        if len(plan.copies):
            self._cache.copy(self._on_device(plan.copies))
        step = PagedStep(
            cache=self._cache,
            slots=self._on_device(plan.slots),
            cu_q=self._on_device(plan.cu_q),
            kv_lens=self._on_device(plan.kv_lens),
            block_tables=self._on_device(plan.block_tables),
        )
        with torch.no_grad(), paged_forward(self._model, step):
            logits: Tensor = self._model(
                input_ids=self._on_device(plan.input_ids).unsqueeze(0),
                position_ids=self._on_device(plan.positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._on_device(plan.logits_rows),
            ).logits
        return logits[0]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
