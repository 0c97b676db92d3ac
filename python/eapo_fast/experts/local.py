"""`LocalModel`: a transformers model in the process as the expert."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_fast.errors import ConfigError, EapoError, ModelError
from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage
from eapo_fast.experts.calling import PROMPT_OVERHEAD, text_bytes
from eapo_fast.experts.chat import PROMPT, SYSTEM, messages, strip_thinking
from eapo_fast.experts.checks import checked_count, checked_prompt
from eapo_fast.experts.lines import digest
from eapo_fast.experts.sanitize import escape_tags, whole_characters
from eapo_fast.experts.threads import DaemonPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalModel:
    """Answers batches with the paged sampler, greedily, on one worker thread.

    `model` and `tokenizer` are loaded objects or a local directory (then `tokenizer` may be
    left out). The model must not be the policy itself: give a copy. Greedy decoding needs no
    random state, so that an expert never disturbs the generators of the run. Special tokens in a
    query are made harmless before the query is encoded. A reply that reaches `max_reply_tokens` is
    kept and flagged `truncated`; a prompt that leaves no room for a reply is `too_long`.
    """

    immediate = False
    priced = True

    def __init__(
        self,
        model: PreTrainedModel | str | PathLike[str],
        tokenizer: PreTrainedTokenizerBase | str | PathLike[str] | None = None,
        *,
        prompt: str = PROMPT,
        system: str = SYSTEM,
        max_reply_tokens: int = 256,
        max_batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        self.prompt = checked_prompt(prompt)
        self.max_reply_tokens = checked_count("max_reply_tokens", max_reply_tokens)
        self.max_batch_size = checked_count("max_batch_size", max_batch_size)
        self.model, self.tokenizer = _load(model, tokenizer, device)
        self.system = system
        from eapo_fast.engine import Sampler, SamplerConfig

        self._sampler = Sampler(
            self.model, config=SamplerConfig(max_batch=max_batch_size, prefix_cache=False)
        )
        self.name = str(getattr(self.model.config, "_name_or_path", "") or "local")
        self._pool: DaemonPool | None = None

    @property
    def identity(self) -> str:
        """Part of cache keys."""
        rest = f"{self.max_reply_tokens}:{self.system}:{self.prompt}"
        return f"local:{self.name}:{_fingerprint(self.model)}:{rest}"

    def worst_case(self, request: ConsultRequest) -> Usage:
        """Bound on one call; free of charge."""
        read = text_bytes(request) + len(f"{self.system}{self.prompt}".encode()) + PROMPT_OVERHEAD
        return Usage(read, self.max_reply_tokens)

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """Generate one reply per request; when cancelled, generation stops at the next token."""
        if self._pool is None:
            self._pool = DaemonPool(1, "eapo-local-model")
        stop = threading.Event()
        try:
            return await asyncio.wrap_future(self._pool.submit(self._generate, requests, stop))
        finally:
            stop.set()

    def _generate(
        self, requests: Sequence[ConsultRequest], stop: threading.Event
    ) -> list[ExpertReply]:
        prompts = [self._encode(request) for request in requests]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) < self._sampler.max_context]
        rows = dict(zip(fits, self._sample([prompts[i] for i in fits], stop), strict=True))
        return [
            self._reply(prompt, rows[i]) if i in rows else _no_room(prompt)
            for i, prompt in enumerate(prompts)
        ]

    def _sample(self, prompts: list[list[int]], stop: threading.Event) -> list[list[int]]:
        """The tokens that follow each prompt, cut where `stop` was set."""
        from eapo_fast.engine import SamplingParams

        if not prompts:
            return []
        params = SamplingParams(
            max_tokens=self.max_reply_tokens,
            temperature=0.0,
            stop_token_ids=tuple(sorted(self._end_ids())),
        )
        sampler = self._sampler
        with sampler.session(prompts, params) as session:
            rules = sampler.rules_of(params)
            rows = [
                session.add_group(prompt, params, rules, prompt_id=i, step=0)[0]
                for i, prompt in enumerate(prompts)
            ]
            while session.unfinished and not stop.is_set():
                session.step()
            return [session.row(row).token_ids.tolist() for row in rows]

    def _encode(self, request: ConsultRequest) -> list[int]:
        special = [token for token in self.tokenizer.all_special_tokens if token]
        query, problem = (
            escape_tags(whole_characters(text), special)  # one bad text must not spoil a batch
            for text in (request.query, request.problem)
        )
        safe = ConsultRequest(query, problem)
        chat = messages(self.system, self.prompt, safe)
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        text = "\n\n".join(message["content"] for message in chat) + "\n\nHint:\n"
        return list(self.tokenizer(text)["input_ids"])

    def _end_ids(self) -> set[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        return {int(end) for end in [*ends, self.tokenizer.eos_token_id] if end is not None}

    def _reply(self, prompt: list[int], row: list[int]) -> ExpertReply:
        ends = self._end_ids()
        written = next((at for at, token in enumerate(row) if token in ends), len(row))
        cut = written == self.max_reply_tokens
        text = str(self.tokenizer.decode(row[:written], skip_special_tokens=True))
        usage = Usage(len(prompt), min(written + 1, len(row)))
        reply = strip_thinking(text)
        if not reply:
            return ExpertReply.failed(
                "too_long" if cut else "malformed", "nothing outside the thinking", usage=usage
            )
        return ExpertReply(reply, usage, self.name, truncated=cut)

    def probe(self) -> str | None:
        """Why the sampler cannot run the model; None if it can."""
        try:
            self._sample([[0]], _already_set())
        except EapoError as error:
            return str(error)
        return None

    async def aclose(self) -> None:
        """End the worker thread; a later call starts a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r}, max_reply_tokens={self.max_reply_tokens})"


def _fingerprint(model: Any) -> str:
    """A digest of a few weights of each tensor: two models of one name are two experts."""
    parts = [
        (name, tuple(tensor.shape), tensor.detach().flatten()[:4].tolist())
        for name, tensor in model.named_parameters()
    ]
    return digest(repr(parts))


def _already_set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def _no_room(prompt: list[int]) -> ExpertReply:
    detail = f"the prompt of {len(prompt)} tokens fills the model's context"
    return ExpertReply.failed("too_long", detail, billed=False)


def _load(model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tokenizer is None and not isinstance(model, str | PathLike):
        raise ConfigError("tokenizer is missing; give it beside a loaded model.")
    source = model if tokenizer is None else tokenizer
    if isinstance(source, str | PathLike):
        tokenizer = _from_directory(AutoTokenizer, source)
    if isinstance(model, str | PathLike):
        model = _from_directory(AutoModelForCausalLM, model).eval()
    return (model if device is None else model.to(device)), tokenizer


def _from_directory(loader: Any, path: str | PathLike[str]) -> Any:
    if not Path(path).is_dir():
        raise ModelError(f"{str(path)!r} is no directory; give a local transformers checkpoint.")
    try:
        return loader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} holds no transformers checkpoint: {error}") from error
