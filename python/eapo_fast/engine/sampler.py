"""`Sampler`: completions from the very parameters that the trainer updates."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from eapo_fast import _core
from eapo_fast.engine.casts import cast_weights
from eapo_fast.engine.forward import PagedForward
from eapo_fast.engine.fused import fused_modules
from eapo_fast.engine.graphs import DecodeGraphs
from eapo_fast.engine.limits import context_limit, vocab_size
from eapo_fast.engine.mode import compute_dtype, current_device, sampling_mode
from eapo_fast.engine.params import Completion, SamplerConfig, SamplingParams, token_list
from eapo_fast.engine.pool import Pool, WeightsVersion, affordable_blocks, host_blocks
from eapo_fast.engine.requests import check_ids, check_prompts, params_of_each, prompt_lists
from eapo_fast.engine.session import Rules, Session
from eapo_fast.engine.support import PagedModel, paged_model
from eapo_fast.engine.vocabulary import Vocabulary
from eapo_fast.errors import ConfigError
from eapo_fast.kernels.native import use_torch_threads

COUNTERS = (
    "preemptions",
    "prefill_tokens",
    "decode_tokens",
    "prefix_hit_tokens",
    "swapped_out_blocks",
)
"""What a sampler counts: rows that lost their slot or KV, tokens computed as prefill (prompts,
replies, what was dropped) and as decode, tokens found in the prefix cache, blocks moved out."""


_EXPLICIT = 4
"""Whoever names the size of the pool may take all of the free memory, not a quarter."""


class Sampler:
    """Paged-KV sampler over a transformers causal LM, without a copy of its weights.

    Args:
        model: a `PreTrainedModel` whose attention goes through transformers' attention interface,
            or a `PeftModel` around one, whose adapters stay unmerged. All of it on one device.
        tokenizer: fast tokenizer; needed only when strings are matched (stop strings, tags).
        config: engine shape.

    Raises:
        ModelError: the model has no LM head. That it cannot run on paged attention is found by a
            short trial forward before the first sampling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None = None,
        config: SamplerConfig | None = None,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        model = self.model
        self.config = config or SamplerConfig()
        self.vocab_size = vocab_size(model)
        self.vocabulary = Vocabulary(tokenizer, self.vocab_size) if tokenizer else None
        token_bytes = self.vocabulary.token_bytes if self.vocabulary else [b""] * self.vocab_size
        self._token_bytes = _core.Vocabulary(token_bytes)
        self.max_context = context_limit(model)
        self._pool: Pool | None = None
        self._graphs: tuple[Pool, DecodeGraphs] | None = None
        self._weights = WeightsVersion(model)
        self._counts: Counter[str] = Counter()
        self._guard, self._busy = threading.Lock(), False
        use_torch_threads()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        prompt_ids: Sequence[int] | None = None,
        step: int = 0,
    ) -> list[list[Completion]]:
        """Sample `params.n` completions of every prompt.

        Args:
            prompts: token ids of each prompt.
            params: how to sample; one for all, or one for each prompt.
            prompt_ids: names of the prompts in the random key; None: their list index.
            step: training step in the random key.

        Returns:
            For each prompt its completions, in order. The result does not depend on batch size,
            block size or the other prompts (up to floating-point rounding of the model's forward).

        Raises:
            ConfigError: strings to match without a tokenizer; an empty or too long prompt, a token
                that the model does not have, a pool too small for one completion.
            ModelError: the model cannot run on paged attention.
        """
        prompts = prompt_lists(prompts)
        names = range(len(prompts)) if prompt_ids is None else token_list("prompt_ids", prompt_ids)
        each = params_of_each(params, len(prompts))
        for name, given in (("params", each), ("prompt_ids", names)):
            if len(given) != len(prompts):
                raise ConfigError(f"{name}: got {len(given)} for {len(prompts)} prompts")
        if not prompts:
            return []
        with self.session(prompts, each) as session:
            groups = [
                session.add_group(p, own, self.rules_of(own), prompt_id=name, step=step)
                for p, own, name in zip(prompts, each, names, strict=True)
            ]
            while session.unfinished:
                session.step()
            return [[_completion(session, seq) for seq in group] for group in groups]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end every row, by the model's present `generation_config`."""
        return _eos_ids(self.model)

    def rules_of(self, params: SamplingParams) -> Rules:
        """Return the rules that `params` and the model's EOS ids ask for."""
        if (params.stop or params.banned_strings) and self.vocabulary is None:
            raise ConfigError("stop and banned_strings need a tokenizer: Sampler(model, tokenizer)")
        check_ids("stop_token_ids", params.stop_token_ids, self.vocab_size)
        check_ids("banned_token_ids", params.banned_token_ids, self.vocab_size)
        return Rules(
            stop_token_ids=tuple(sorted({*self.eos_token_ids, *params.stop_token_ids})),
            stop=tuple(params.stop),
            banned_token_ids=tuple(params.banned_token_ids),
            banned_strings=tuple(params.banned_strings),
        )

    def forget_prefixes(self) -> None:
        """Let no cached prefix match from now on.

        Needed after weights were changed behind autograd's back (through `.data`, or by another
        process); changes in place and steps of torch's optimizers are noticed at the next call.
        """
        if self._pool is not None:
            self._pool.blocks.advance_epoch()

    def drain_counters(self) -> dict[str, int]:
        """Return `COUNTERS` of the sessions that ended since the last call."""
        counts, self._counts = self._counts, Counter()
        return {name: counts[name] for name in COUNTERS}

    @contextmanager
    def session(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        foreign_tokens: int = 0,
    ) -> Iterator[Session]:
        """Open a session whose pool suits `prompts` x n rows; the model is in eval mode inside.

        Args:
            prompts: token ids of the prompts to come.
            params: give n and max_tokens; one for all, or one for each prompt.
            foreign_tokens: most injected tokens of a row; a single row always fits the pool.
        """
        mine = False
        try:
            with self._guard:
                if self._busy:
                    raise ConfigError(
                        "this Sampler is in use (by another thread, or further up): one session "
                        "at a time. Make a second Sampler over the same model"
                    )
                self._busy = mine = True
            with self._open(prompts, params, foreign_tokens) as session:
                yield session
        finally:
            if mine:
                self._busy = False

    @contextmanager
    def _open(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        foreign_tokens: int,
    ) -> Iterator[Session]:
        with (
            current_device(self.model.device),
            self._opened(prompts, params, foreign_tokens) as session,
        ):
            yield session

    @contextmanager
    def _opened(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        foreign_tokens: int,
    ) -> Iterator[Session]:
        each = params_of_each(params, len(prompts))
        check_prompts(prompts, self.max_context, self.vocab_size)
        paged = paged_model(self.model, self.config.block_size)
        pool = self._reserve([len(p) for p in prompts], each, foreign_tokens, paged)
        if self._weights.changed():
            pool.blocks.advance_epoch()
        forward = PagedForward(self.model, pool.cache, paged.windows, self._graphs_of(pool, paged))
        fused = fused_modules(self.model) if self.config.fused_modules else nullcontext()
        session = Session(
            self.model.device,
            pool,
            self._token_bytes,
            config=self.config,
            max_context=self.max_context,
            forward=forward,
        )
        try:
            with sampling_mode(self.model), cast_weights(self.model), fused:
                yield session
            stats = session.scheduler.stats()
            self._counts.update({name: stats[name] for name in COUNTERS})
        finally:
            session.scheduler.clear()  # a traceback may keep the session, not its blocks

    def _reserve(
        self,
        lengths: Sequence[int],
        params: Sequence[SamplingParams],
        foreign: int,
        paged: PagedModel,
    ) -> Pool:
        """Have a pool for the rows at hand, as far as memory allows.

        It always holds one whole row, so that its size never cuts a rollout short. Replies are
        expected to be no longer than the policy's own text; more is what preemption is for.
        """
        size, wanted = self.config.block_size, self.config.num_blocks
        own = [
            min(n + p.max_tokens, self.max_context) for n, p in zip(lengths, params, strict=True)
        ]
        longest = max(own, default=1)
        whole = min(longest + foreign, self.max_context)
        least = -(-whole // size) + 2
        most = affordable_blocks(self.model, self._block_bytes(paged))
        if wanted is None:
            wanted = max(least, min(self._expected_blocks(lengths, params, foreign), most))
        elif wanted * size < whole:
            replies = f" and up to {foreign} injected ones" if foreign else ""
            raise ConfigError(
                f"num_blocks: got {wanted} blocks of {size} tokens, but a prompt with its "
                f"max_tokens{replies} needs {whole} tokens: allowed is {-(-whole // size)} or "
                f"more, or None"
            )
        elif wanted > _EXPLICIT * most and self._pool is None:
            raise ConfigError(
                f"num_blocks: got {wanted} blocks, which take "
                f"{wanted * self._block_bytes(paged) / 1e9:.0f} GB; the memory that is free on "
                f"{self.model.device} holds {_EXPLICIT * most}. None takes what is needed"
            )
        kind = compute_dtype(self.model), self.model.device
        pool = self._pool
        if pool is None or pool.blocks.num_blocks < wanted or pool.kind != kind:
            host = host_blocks(self.model, self.config, wanted, self._block_bytes(paged))
            pool = self._pool = Pool(wanted, size, host, kind)
        return pool

    def _graphs_of(self, pool: Pool, paged: PagedModel) -> DecodeGraphs | None:
        """Return the captured decode steps of this pool, on a GPU; they outlive sessions."""
        if self.model.device.type != "cuda" or not self.config.cuda_graphs:
            return None
        if self._graphs is None or self._graphs[0] is not pool:
            graphs = DecodeGraphs(self.model, pool.cache, windows=paged.windows, capture=True)
            self._graphs = pool, graphs
        self._graphs[1].refresh()
        return self._graphs[1]

    def _block_bytes(self, paged: PagedModel) -> int:
        return paged.kv_elements * compute_dtype(self.model).itemsize * self.config.block_size

    def _expected_blocks(
        self, lengths: Sequence[int], params: Sequence[SamplingParams], foreign: int
    ) -> int:
        """Blocks of as many rows as are ever alive at once, prompts shared by their groups."""
        size = self.config.block_size
        rows = sorted(
            (
                -(-min(p.max_tokens + min(foreign, p.max_tokens), self.max_context) // size) + 1
                for p in params
                for _ in range(p.n)
            ),
            reverse=True,
        )
        shared = sum(-(-length // size) + 1 for length in lengths)
        return sum(rows[: 2 * self.config.max_batch]) + shared


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
    """Return the ids that end `generate`; negative ones, which switch EOS off, are none."""
    generation = getattr(model, "generation_config", None)
    ids = (generation or model.config).eos_token_id
    listed = ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    return tuple(int(i) for i in listed if i >= 0)
