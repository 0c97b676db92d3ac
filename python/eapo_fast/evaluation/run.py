"""`evaluate_model`: sample, grade, keep and report, chunk by chunk."""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eapo_fast.config import EAPOConfig
from eapo_fast.data import check_golds, encode_prompts, load_dataset, require_column
from eapo_fast.engine import Sampler, SamplerConfig, SamplingParams
from eapo_fast.errors import ConfigError
from eapo_fast.evaluation.picture import draw_evaluation
from eapo_fast.evaluation.records import problem_record
from eapo_fast.evaluation.settings import EvalSettings, check_mode, identity, model_name
from eapo_fast.evaluation.store import PICTURE, Record, Store
from eapo_fast.evaluation.summary import summarise
from eapo_fast.evaluation.timing import timing_of, timing_summary
from eapo_fast.experts import ConsultPolicy, ConsultScheduler, Expert
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts
from eapo_fast.training.arguments import for_device
from eapo_fast.training.generation import autocast
from eapo_fast.training.setup import load_model, load_tokenizer

Progress = Callable[[Sequence[Record], int, int, float], None]
"""Called with all records so far, how many of them are this call's, the number of problems, and the
seconds of this call."""
_GOLDS_SHOWN = 50
_STEP = 0
"""Part of the keys of all draws."""


def evaluate_model(
    model: str | Path | PreTrainedModel,
    data: Any,
    out: str | Path | None = None,
    settings: EvalSettings | None = None,
    *,
    expert: Expert | None = None,
    protocol: ConsultProtocol | None = None,
    expert_record: str | Path | None = None,
    processing_class: Any | None = None,
    restart: bool = False,
    use_cpu: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model on problems with reference answers.

    Without an expert the model works alone: the tag that opens a consult is banned. With one,
    consults are allowed and always accepted.

    The folder `out` gets `problems.jsonl` (a line per problem with all its samples),
    `evaluation.json` (the returned value), `evaluation.png`, `timing.jsonl` and `identity.json`. A
    call with the same arguments continues what is there and gives what one call would have given:
    every draw is keyed by seed, problem, sample and position, and problems are sampled in chunks
    that do not depend on where it stopped. (Replies of an expert that answers differently each
    time are as they come, and their timing decides what is batched together, hence roundings.)

    Args:
        model: transformers directory, adapter directory or hub id, or the model itself.
        data: JSONL file, list of dicts or `datasets.Dataset`: any of prompt, problem, question and
            of answer, solution.
        out: folder; None: `runs/eval/<model>-<data>-<method, solo or assisted>`.
        settings: None: the paper's protocol.
        expert: answers every consult.
        protocol: how consults are written; its limits come from `settings`.
        expert_record: file that every reply is written to; `experts.Recorded` answers from it.
        processing_class: tokenizer; None: the one beside the model.
        restart: set an earlier evaluation in `out` aside and begin anew.
        use_cpu: stay on the CPU even when a GPU is there.
        progress: called after every chunk.

    Returns:
        `evaluation.json`: see `summary.summarise`, and the settings and timing beside it.

    Raises:
        ConfigError, DataError, ModelError: before anything is sampled; among them an `out` that
            holds an evaluation of another model, other data or other settings.
    """
    settings = settings or EvalSettings()
    check_mode(settings, assisted=expert is not None)
    rows = _problems(data, settings.limit)
    run = _Run(model, rows, settings, expert, protocol, processing_class, use_cpu)
    run.expert_record = expert_record
    folder = Path(out) if out else default_folder(model, data, settings, expert is not None)
    with Store(folder, run.identity(), settings.problems_at_once, restart=restart) as store:
        run.sample(store, progress)
        result = {
            "title": settings.title(assisted=expert is not None),
            "kind": "assisted" if expert is not None else "solo",
            "model": str(getattr(model, "name_or_path", model)),
            "data": str(data) if isinstance(data, (str, Path)) else type(data).__name__,
            "folder": str(folder),
            "settings": dataclasses.asdict(settings),
            "expert": run.expert_name,
            "digests": {k: run.identity()[k] for k in ("model", "data")},
            "results": summarise(store.records, seed=settings.seed),
            "timing": timing_summary(store.timing),
        }
        draw_evaluation(result, folder / PICTURE)
        store.finish(result)
    return result


def default_folder(model: Any, data: Any, settings: EvalSettings, assisted: bool) -> Path:
    """Return `runs/eval/<model>-<data>-<kind>`; the model of `runs/x/final` is called `x`."""
    name = model_name(str(getattr(model, "name_or_path", model)))
    source = Path(data).stem if isinstance(data, (str, Path)) else "data"
    kind = settings.method or ("assisted" if assisted else "solo")
    return Path("runs/eval") / re.sub(r"[^\w.-]+", "_", f"{name}-{source}-{kind}")


def _problems(data: Any, limit: int | None) -> list[dict[str, Any]]:
    rows = load_dataset(data, name="data")[:limit]
    require_column(rows, "answer", needed_by="evaluation")
    unreadable = check_golds(rows)
    if unreadable:
        listed = "\n  ".join(unreadable[:_GOLDS_SHOWN])
        more = f"\n  and {len(unreadable) - _GOLDS_SHOWN} more" * (len(unreadable) > _GOLDS_SHOWN)
        warnings.warn(
            f"data: {len(unreadable)} of {len(rows)} reference answers cannot be compared; only "
            f"the same text counts as correct there:\n  {listed}{more}",
            stacklevel=3,
        )
    return rows


@dataclass(slots=True)
class _Chunk:
    """Problems first..last-1, graded in the background as their groups end."""

    first: int
    records: list[Future[Record]]
    rollouts: list[Rollout]
    seconds: float


class _Run:
    """Model, prompts and rules of one evaluation."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        rows: list[dict[str, Any]],
        settings: EvalSettings,
        expert: Expert | None,
        protocol: ConsultProtocol | None,
        tokenizer: Any | None,
        use_cpu: bool,
    ) -> None:
        self.settings, self.rows, self.expert = settings, rows, expert
        self.expert_record: str | Path | None = None
        plain = EAPOConfig(use_cpu=use_cpu)
        self.model = load_model(model, plain)
        self.args = for_device(plain, self.model.device)
        self.tokenizer = load_tokenizer(tokenizer, self.model)
        block = 64 if self.model.device.type == "cuda" else 16
        self.sampler = Sampler(self.model, self.tokenizer, SamplerConfig(block_size=block))
        self.protocol = dataclasses.replace(
            protocol or ConsultProtocol(),
            max_turns=settings.max_turns,
            max_queries=settings.max_queries,
        )
        for tag in self.protocol.tags if expert is not None else ():
            self.sampler.vocabulary.check_tag(tag)  # type: ignore[union-attr]
        self.prompts = encode_prompts(
            rows,
            self.tokenizer,
            system=self._system(),
            max_prompt_length=self.sampler.max_context - 1,
        )
        self.params = SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            n=settings.n,
            seed=settings.seed,
            stop_token_ids=(self.tokenizer.eos_token_id,),
        )
        self._digest: dict[str, Any] | None = None

    @property
    def expert_name(self) -> str | None:
        if self.expert is None:
            return None
        return str(getattr(self.expert, "identity", type(self.expert).__qualname__))

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        if self._digest is None:
            protocol = [*self.protocol.tags, sorted(self.protocol.notices.items())]
            asked = [self.prompts, protocol, self.expert_name, bool(self.args.bf16)]
            self._digest = identity(self.settings, self.model, self.tokenizer, self.rows, asked)
        return self._digest

    def sample(self, store: Store, progress: Progress | None) -> None:
        """Sample and grade what the store lacks."""
        started = time.perf_counter()
        total, size, kept = len(self.rows), self.settings.problems_at_once, len(store.records)
        with ExitStack() as stack:
            graders = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="eapo-grade"))
            scheduler = None
            if self.expert is not None and len(store.records) < total:
                scheduler = stack.enter_context(self._scheduler(self.expert))
                scheduler.skip_parts(_STEP, -(-kept // size))
            while len(store.records) < total:
                first = len(store.records)
                chunk = self._chunk(first, min(first + size, total), scheduler, graders)
                records = [future.result() for future in chunk.records]
                store.append(records, timing_of(first, chunk.rollouts, chunk.seconds))
                if progress is not None:
                    fresh = len(store.records) - kept
                    progress(store.records, fresh, total, time.perf_counter() - started)

    def _chunk(
        self,
        first: int,
        stop: int,
        scheduler: ConsultScheduler | None,
        graders: ThreadPoolExecutor,
    ) -> _Chunk:
        vocabulary = self.sampler.vocabulary
        assert vocabulary is not None
        futures: dict[int, Future[Record]] = {}

        def grade(group: list[Rollout]) -> None:
            index = group[0].prompt_id
            row = self.rows[index]
            futures[index] = graders.submit(problem_record, index, row, group, vocabulary)

        started = time.perf_counter()
        self.sampler.forget_prefixes()  # a continued evaluation has none either
        with autocast(self.args, self.model.device):
            rollouts = collect_rollouts(
                self.sampler,
                self.prompts[first:stop],
                self.params,
                protocol=self.protocol,
                scheduler=scheduler,
                step=_STEP,
                prompt_ids=range(first, stop),
                problems=[problem_text(row["prompt"]) for row in self.rows[first:stop]],
                on_group=grade,
            )
        seconds = time.perf_counter() - started
        return _Chunk(first, [futures[i] for i in range(first, stop)], rollouts, seconds)

    def _scheduler(self, expert: Expert) -> ConsultScheduler:
        policy = ConsultPolicy(
            schedule="constant", timeout=self.settings.expert_timeout, record=self.expert_record
        )
        scheduler = ConsultScheduler(expert, policy, seed=self.settings.seed)
        problem = scheduler.probe()
        if problem is not None:
            scheduler.close()
            raise ConfigError(f"expert: {problem}; an assisted evaluation needs one that answers")
        return scheduler

    def _system(self) -> str | None:
        settings = self.settings
        if self.expert is None:
            return settings.system_prompt
        text = settings.consult_prompt
        text = self.protocol.instructions() if text is None else text
        return "\n\n".join(part for part in (settings.system_prompt, text) if part) or None


def problem_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return what the expert reads as the problem."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(m["content"]) for m in prompt if m["role"] == "user")
