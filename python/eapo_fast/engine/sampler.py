"""`Sampler`: completions from the very parameters that the trainer updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from eapo_fast import _core
from eapo_fast.engine.cache import PagedCache, memory_budget
from eapo_fast.engine.params import Completion, SamplerConfig, SamplingParams
from eapo_fast.engine.session import Rules, Session
from eapo_fast.engine.vocabulary import Vocabulary
from eapo_fast.errors import ConfigError, ModelError


class Sampler:
    """Paged-KV sampler over a transformers causal LM, without a copy of its weights.

    Args:
        model: a `PreTrainedModel` whose attention goes through transformers' attention interface.
        tokenizer: fast tokenizer; needed only when strings are matched (stop strings, tags).
        config: engine shape.

    Raises:
        ModelError: the model cannot run on paged attention (found by a short trial forward).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None = None,
        config: SamplerConfig | None = None,
    ) -> None:
        self.model = model
        self.config = config or SamplerConfig()
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.vocabulary = Vocabulary(tokenizer, self.vocab_size) if tokenizer else None
        self.eos_token_ids = _eos_ids(model)
        text_config = model.config.get_text_config()
        self.max_context = int(getattr(text_config, "max_position_embeddings", None) or 1 << 20)
        self._cache: PagedCache | None = None
        self._pool: _core.KvPool | None = None
        _core.set_num_threads(torch.get_num_threads())
        if not getattr(model, "_supports_attention_backend", False):
            raise ModelError(
                f"model: {type(model).__name__} does not go through transformers' attention "
                f"interface, so its attention cannot be paged"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | None = None,
        step: int = 0,
    ) -> list[list[Completion]]:
        """Sample `params.n` completions of every prompt.

        Args:
            prompts: token ids of each prompt.
            params: how to sample.
            prompt_ids: names of the prompts in the random key; None: their list index.
            step: training step in the random key.

        Returns:
            For each prompt its completions, in order. The result does not depend on batch size,
            block size or the other prompts (up to floating-point rounding of the model's forward).

        Raises:
            ConfigError: strings to match without a tokenizer; an empty or too long prompt.
        """
        names = range(len(prompts)) if prompt_ids is None else prompt_ids
        with self.session(prompts, params) as session:
            rules = self.rules_of(params)
            groups = [
                session.add_group(p, params, rules, prompt_id=name, step=step)
                for p, name in zip(prompts, names, strict=True)
            ]
            while session.unfinished:
                session.step()
            return [[_completion(session, seq) for seq in group] for group in groups]

    def rules_of(self, params: SamplingParams) -> Rules:
        """Return the rules that `params` and the model's EOS ids ask for."""
        if (params.stop or params.banned_strings) and self.vocabulary is None:
            raise ConfigError("stop and banned_strings need a tokenizer: Sampler(model, tokenizer)")
        return Rules(
            stop_token_ids=tuple(sorted({*self.eos_token_ids, *params.stop_token_ids})),
            stop=tuple(params.stop),
            banned_token_ids=tuple(params.banned_token_ids),
            banned_strings=tuple(params.banned_strings),
        )

    @contextmanager
    def session(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, foreign_tokens: int = 0
    ) -> Iterator[Session]:
        """Open a session whose pool suits `prompts` x n rows; the model is in eval mode inside.

        Args:
            prompts: token ids of the prompts to come.
            params: gives n and max_tokens.
            foreign_tokens: most injected tokens of a row; a single row always fits the pool.
        """
        self._check_prompts(prompts)
        self._reserve([len(p) for p in prompts], params, foreign_tokens)
        assert self._cache is not None
        assert self._pool is not None
        self._pool.advance_epoch()  # the weights may have changed since the last session
        training = self.model.training
        self.model.eval()
        try:
            session = Session(
                self.model,
                self._cache,
                self._pool,
                self.vocabulary,
                max_batch=self.config.max_batch,
                max_prefill_tokens=self.config.max_prefill_tokens,
                max_context=self.max_context,
                vocab_size=self.vocab_size,
            )
            try:
                yield session
            finally:
                session.scheduler.clear()
        finally:
            self.model.train(training)

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.max_context:
                raise ConfigError(
                    f"prompt {index}: {len(prompt)} tokens, allowed are 1 to "
                    f"{self.max_context - 1} (the model's context is {self.max_context})"
                )

    def _reserve(self, lengths: Sequence[int], params: SamplingParams, foreign: int) -> None:
        """Have a pool for the rows at hand, as far as memory allows.

        It always holds one whole row, so that its size never cuts a rollout short. Replies are
        expected to be no longer than the policy's own text; more is what preemption is for.
        """
        size = self.config.block_size
        wanted = self.config.num_blocks
        if wanted is None:
            rows = min(len(lengths) * params.n, 2 * self.config.max_batch)
            expected = params.max_tokens + min(foreign, params.max_tokens)
            own = rows * (-(-min(expected, self.max_context) // size) + 1)
            shared = sum(-(-length // size) + 1 for length in lengths)
            whole = max(lengths, default=1) + params.max_tokens + foreign
            least = -(-min(whole, self.max_context) // size) + 2
            wanted = max(least, min(own + shared, self._affordable_blocks()))
        if self._cache is None or self._cache.num_blocks < wanted:
            self._cache = PagedCache(wanted, size)
            self._pool = _core.KvPool(wanted, size)

    def _affordable_blocks(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        per_token = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        return int(memory_budget(self.model.device) // (per_token * self.config.block_size))


def _completion(session: Session, seq: int) -> Completion:
    row = session.row(seq)
    session.release(seq)
    return Completion(
        token_ids=row.token_ids.tolist(),
        logprobs=row.logprobs.tolist(),
        kept_mass=row.kept_mass.tolist(),
        finish_reason=row.finish_reason,  # type: ignore[arg-type]
    )


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = model.config.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
