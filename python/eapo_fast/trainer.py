"""`Trainer`: the loop, and nothing else.

    prompts -> rollouts (consults) -> rewards -> group filter, advantages -> packed loss -> update

Every station is a module of `eapo_fast.training`; this file decides their order, what is logged,
evaluated and saved, and when. One process trains the whole model; there is no distribution here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from eapo_fast.config import EAPOConfig
from eapo_fast.data import (
    PromptSampler,
    drop_long_prompts,
    encode_prompts,
)
from eapo_fast.engine import Sampler, SamplerConfig
from eapo_fast.errors import ConfigError
from eapo_fast.evaluation import Evaluation, evaluate_rows
from eapo_fast.experts import ConsultScheduler, Expert, Ledger
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.training.arguments import (
    check_unsupported,
    eval_params,
    for_device,
    load_rows,
    reward_list,
    seed_everything,
)
from eapo_fast.training.checkpoint import (
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    save_model,
)
from eapo_fast.training.consulting import (
    ConsultCounts,
    accuracy_by_help,
    build_scheduler,
    consult_metrics,
    leak_metrics,
    turns_at,
)
from eapo_fast.training.generation import (
    Generation,
    autocast,
    generate,
    generation_metrics,
    train_params,
)
from eapo_fast.training.optimizer import learning_rate
from eapo_fast.training.progress import Means, Phases
from eapo_fast.training.recipe import resolve_recipe
from eapo_fast.training.record import RunRecord
from eapo_fast.training.reliance import assisted_and_correct, reliance
from eapo_fast.training.scoring import RewardFunction, Scorer
from eapo_fast.training.setup import load_model, load_tokenizer, output_folder, with_adapter
from eapo_fast.training.update import Updater

Dataset = str | Path | Sequence[Mapping[str, Any]]


class Trainer:
    """Train a causal LM with EAPO (arXiv 2509.23730) or another recipe.

    The order and names of the arguments are TRL's.

    Args:
        model: directory (or hub id) of a transformers model, or the model itself.
        reward_funcs: callables after TRL's contract, or names in `eapo_fast.rewards`;
            None: `rewards.exact` (1 correct, 0.1 well-formed, 0).
        args: settings; None: the defaults of `EAPOConfig`.
        train_dataset: JSONL path, list of dicts or `datasets.Dataset` with `prompt` (or
            `problem`, `question`) and, for the stock rewards, `answer` (or `solution`).
        eval_dataset: the same, held apart.
        processing_class: tokenizer; None: the one beside the model.
        reward_processing_classes: TRL's name; only None, since models as rewards are not supported.
        callbacks: `transformers.TrainerCallback`s.
        optimizers: TRL's name; only (None, None): the optimizer is AdamW.
        peft_config: a PEFT config: train an adapter.
        expert: who answers consults; None: plain reinforcement learning.
        protocol: how consults are written (its limits come from `args`); None: the default when
            there is an expert. With a protocol and no expert the opening tag is banned in sampling
            and in the loss.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained, naming field and remedy.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        args: EAPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Any | None = None,
        reward_processing_classes: Any | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        peft_config: Any | None = None,
        expert: Expert | None = None,
        protocol: ConsultProtocol | None = None,
    ) -> None:
        check_unsupported(reward_processing_classes, optimizers)
        self.args = args or EAPOConfig()
        self.recipe = resolve_recipe(self.args)
        functions = reward_list(reward_funcs)
        self.train_rows = load_rows(train_dataset, "train_dataset", functions)
        self.eval_rows = load_rows(eval_dataset, "eval_dataset", functions)
        self.model = with_adapter(load_model(model, self.args), peft_config, self.args)
        self.args = for_device(self.args, self.model.device)
        self.processing_class = load_tokenizer(processing_class, self.model)
        self.output_dir = output_folder(self.args, self.model)
        self.callbacks = list(callbacks or ())
        self._build_sampler(expert, protocol)
        self._encode()
        self.state = TrainerState(max_steps=self._total_steps())
        self.control = TrainerControl()
        self.ledger = Ledger(self.args.expert_budget)
        self.scheduler = self._new_scheduler()
        self.scorer = Scorer(
            functions, self.args.reward_weights, self.sampler.vocabulary, self.state  # type: ignore[arg-type]
        )  # fmt: skip
        rate = learning_rate(self.args, self.state.max_steps)
        self.updater = Updater(self.model, self.args, self.recipe, rate)
        self.phases, self.counts, self._means = Phases(), ConsultCounts(), Means()
        self._tokens = 0

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train to `max_steps`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest of this run.

        Returns:
            `TrainOutput(global_step, training_loss, metrics)`; the last metrics are those of the
            run's summary.

        Raises:
            ConfigError: nothing to train on, no checkpoint to resume, or a trainer that has trained
                already (it would overwrite its own results).
        """
        if self.train_rows is None:
            raise ConfigError("train_dataset: none was given, so there is nothing to train on")
        if self.state.global_step and not resume_from_checkpoint:
            raise ConfigError(
                f"train() was called at step {self.state.global_step}: continue with "
                f"resume_from_checkpoint=True, or make a new Trainer"
            )
        seed_everything(self.args)
        self.control.should_training_stop = False
        self.scheduler = self.scheduler or self._new_scheduler()
        resumed = self._resume(resume_from_checkpoint)
        if self.ledger.budgets:
            self.ledger.keep_journal(self.output_dir / "ledger.jsonl", resumed=resumed)
        if self.scheduler is not None:
            after = self.state.global_step if resumed else None
            self.scheduler.keep_replies(self.output_dir / "replies.jsonl", after=after)
        self._record = RunRecord(self, resumed)
        try:
            with self._record:
                summary = self._run(resumed)
        finally:
            self.scheduler = None
            self.ledger.close()
        return TrainOutput(self.state.global_step, self._record.mean_loss(), summary)

    def _run(self, resumed: bool) -> dict[str, Any]:
        started = time.perf_counter() - self.phases.total["total"]
        self._warn_about_expert()
        self._call("on_train_begin")
        if self.args.eval_on_start and not resumed and self.eval_rows:
            self._evaluate_and_log()
        while self.state.global_step < self.state.max_steps and not self._stopped():
            self._cycle()
            self.phases.total["total"] = time.perf_counter() - started
        self._call("on_train_end")
        self.phases.total["total"] = time.perf_counter() - started
        return self._record.finish()

    def evaluate(self, *, assisted: bool = False) -> dict[str, float]:
        """Evaluate on `eval_dataset`: alone, or with consults that are always accepted.

        Returns:
            `eval_solo_*` or `eval_assisted_*`: accuracy (mean@n), its 95 % interval, reward,
            lengths; with `num_generations_eval` above 1 also `any_at_n`, `maj_at_n` and `var`.
        """
        return self.evaluation(assisted=assisted).metrics("assisted" if assisted else "solo")

    def evaluation(self, *, assisted: bool = False) -> Evaluation:
        """Return the rollouts and scores behind `evaluate`."""
        if not self.eval_rows:
            raise ConfigError("eval_dataset: none was given, so there is nothing to evaluate on")
        if assisted and self.expert is None:
            raise ConfigError("assisted evaluation needs an expert: Trainer(..., expert=...)")
        with self.phases.measure("evaluation"), autocast(self.args, self.model.device):
            if not assisted:
                return self._evaluate(self.eval_rows, self.eval_prompts, None)
            rows, prompts = self._encoded(self.eval_rows, self._consult_text)
            always = self.args.replace(
                consult_schedule="constant", expert_record=None, expert_replay=None
            )
            self.ledger.forget(step=0)  # caps per step, prompt and rollout start anew
            total, expert = self.state.max_steps, self.expert
            with build_scheduler(expert, always, total, self.ledger) as scheduler:  # type: ignore[arg-type]
                return self._evaluate(rows, prompts, scheduler)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write model and tokenizer in the transformers layout; None: `<output_dir>/final`."""
        folder = Path(output_dir or self.output_dir / "final")
        save_model(self.model, self.processing_class, folder)

    def add_callback(self, callback: Any) -> None:
        """Add a `transformers.TrainerCallback`."""
        self.callbacks.append(callback)

    def describe(self) -> dict[str, Any]:
        """Return the counts that follow from the settings, for the start of a run."""
        args = self.args
        return {
            "recipe": self.recipe.name,
            "optimizer_steps": self.state.max_steps,
            "prompts_per_generation": args.prompts_per_generation,
            "rollouts_per_prompt": args.num_generations,
            "completions_per_generation": args.completions_per_generation,
            "completions_per_step": args.completions_per_step,
            "train_prompts": len(self.train_rows or ()),
            "eval_prompts": len(self.eval_rows or ()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.model.device),
            "precision": "bfloat16 autocast" if args.bf16 else str(self.model.dtype),
            "consults": "none" if self.expert is None else type(self.expert).__name__,
            "output_dir": str(self.output_dir),
        }

    def _build_sampler(self, expert: Expert | None, protocol: ConsultProtocol | None) -> None:
        args = self.args
        self.expert = expert
        if getattr(expert, "model", None) is self.model:
            raise ConfigError("expert: it holds the policy itself; give it a copy of the model")
        if expert is not None and protocol is None:
            protocol = ConsultProtocol()
        if protocol is not None:
            limits = {"max_turns": args.max_turns, "max_queries": args.max_queries_per_turn}
            protocol = dataclasses.replace(protocol, **limits)  # type: ignore[arg-type]
        self.protocol = protocol
        default_block = 64 if self.model.device.type == "cuda" else 16
        config = SamplerConfig(
            max_batch=args.sampler_max_batch,
            block_size=args.sampler_block_size or default_block,
        )
        self.sampler = Sampler(self.model, self.processing_class, config)
        for tag in protocol.tags if protocol else ():
            self.sampler.vocabulary.check_tag(tag)  # type: ignore[union-attr]
        self.train_params = train_params(args, self.processing_class)
        self.eval_params = eval_params(args, self.processing_class)

    def _new_scheduler(self) -> ConsultScheduler | None:
        if self.expert is None:
            return None
        return build_scheduler(self.expert, self.args, self.state.max_steps, self.ledger)

    def _encode(self) -> None:
        """Tokenise the prompts: with the consult paragraph in training, without it elsewhere."""
        args = self.args
        self._consult_text = self._system_with_consults()
        if self.train_rows is not None:
            self.train_rows, self.train_prompts = self._encoded(self.train_rows, self._consult_text)
            self.prompt_sampler = PromptSampler(
                len(self.train_rows),
                args.prompts_per_generation,
                seed=args.seed if args.data_seed is None else args.data_seed,
                shuffle=args.shuffle_dataset,
            )
        if self.eval_rows is not None:
            self.eval_rows, self.eval_prompts = self._encoded(self.eval_rows, args.system_prompt)

    def _encoded(
        self, rows: list[dict[str, Any]], system: str | None
    ) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """Return rows and their prompt ids, prompts over `max_prompt_length` left out."""
        prompts = encode_prompts(
            rows,
            self.processing_class,
            system=system,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        limit = self.args.max_prompt_length or self.sampler.max_context - 1
        return drop_long_prompts(rows, prompts, limit)

    def _system_with_consults(self) -> str | None:
        args = self.args
        if self.expert is None or self.protocol is None:
            return args.system_prompt
        text = self.protocol.instructions() if args.consult_prompt is None else args.consult_prompt
        return "\n\n".join(part for part in (args.system_prompt, text) if part) or None

    def _total_steps(self) -> int:
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        rows = len(self.train_rows or ())
        cycles = rows // args.prompts_per_generation * args.num_train_epochs
        return max(1, math.ceil(cycles)) * args.steps_per_cycle

    def _cycle(self) -> None:
        """One generation and the optimizer steps that use it."""
        step = self.state.global_step + 1
        max_turns = turns_at(step, self.args, self.state.max_steps)
        self._call("on_step_begin")
        generation = generate(
            self.sampler,
            self.scorer,
            self.prompt_sampler.next(),
            self.train_rows or [],
            self.train_prompts,
            self.train_params,
            self.args,
            self.recipe,
            protocol=self.protocol.with_turns(max_turns) if self.protocol else None,
            scheduler=self.scheduler,
            step=step,
            phases=self.phases,
        )
        kept = generation.kept()
        with self.phases.measure("update"):
            self.updater.observe([generation.rollouts[i] for i in kept])
        shared = self._generation_metrics(generation, step, max_turns)
        shares = np.array_split(kept, self._slices())
        cycle = self.args.steps_per_cycle
        for index in range(cycle):
            if index:
                self._call("on_step_begin")
            self._step(generation, shares[index % len(shares)].tolist(), shared)
            shared = {}
            done = self.state.global_step >= self.state.max_steps
            if done or index == cycle - 1:
                self._save_if_due()
            if done or self._stopped():
                return

    def _slices(self) -> int:
        return self.args.slices_per_generation // self.args.gradient_accumulation_steps

    def _step(
        self, generation: Generation, chosen: Sequence[int], shared: Mapping[str, float]
    ) -> None:
        """One optimizer step; `shared` are metrics of the generation, logged once."""
        step = self.state.global_step + 1
        with self.phases.measure("update"):
            update = self.updater.step(
                [generation.rollouts[i] for i in chosen],
                [generation.advantages[i] for i in chosen],
                step,
            )
        self.state.global_step = step
        self.state.epoch = self._epoch()
        self._means.add({**shared, **update, "epoch": self.state.epoch})
        self._record.step(step, {**shared, **update}, generation if shared else None)
        self._call("on_step_end")
        last = step == self.state.max_steps
        if step % self.args.logging_steps == 0 or last or self.control.should_log:
            self._log(self._means.drain())
        due = self.args.eval_strategy == "steps" and (step % self.args.eval_steps == 0 or last)
        if self.eval_rows and (due or self.control.should_evaluate):
            self._evaluate_and_log()
        self.control.should_log = self.control.should_evaluate = False

    def _generation_metrics(
        self, generation: Generation, step: int, max_turns: int
    ) -> dict[str, float]:
        metrics = generation_metrics(generation, self.args.num_generations)
        if self.scheduler is not None:
            rho = self.scheduler.acceptance(step)
            metrics |= consult_metrics(generation.rollouts, rho, max_turns)
            accuracies = [s.accuracy for s in generation.scores]
            metrics |= accuracy_by_help(generation.rollouts, accuracies)
            metrics |= leak_metrics(generation.leaks, generation.rollouts, accuracies)
            metrics |= self._reliance(generation, accuracies, step)
            self._record.consults.write(step, generation, self.scheduler)
            self.ledger.forget(before=step)
            drained = self.scheduler.drain_metrics()
            self.counts.take(drained)
            metrics |= drained
        tokens = sum(len(r.token_ids) + len(r.prompt_ids) for r in generation.rollouts)
        self._tokens += tokens
        metrics |= {"num_tokens": float(self._tokens)}
        for name, values in self.scorer.metrics.items():
            metrics[name] = sum(values) / len(values)
        self.scorer.metrics.clear()
        return metrics | self._record.pace(generation)

    def _reliance(
        self, generation: Generation, accuracies: Sequence[float | None], step: int
    ) -> dict[str, float]:
        if (step - 1) % self.args.reliance_steps:
            return {}
        chosen = assisted_and_correct(generation.rollouts, accuracies, self.args.reliance_rollouts)
        return {"expert/reliance": reliance(self.updater, chosen)} if chosen else {}

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._record.log(self.state.global_step, metrics)
        self._call("on_log", logs=metrics)

    def _evaluate_and_log(self) -> None:
        evaluation = self.evaluation()
        metrics = evaluation.metrics("solo")
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._record.evaluation(self.state.global_step, metrics, evaluation)
        self._call("on_evaluate", metrics=metrics)

    def _evaluate(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Sequence[int]],
        scheduler: ConsultScheduler | None,
    ) -> Evaluation:
        return evaluate_rows(
            self.sampler,
            prompts,
            rows,
            self.eval_params,
            self.scorer,
            protocol=self.protocol,
            scheduler=scheduler,
        )

    def _save_if_due(self) -> None:
        """Checkpoint at the first cycle end on or after a multiple of `save_steps`."""
        args, step = self.args, self.state.global_step
        regular = step % args.save_steps < args.steps_per_cycle or step == self.state.max_steps
        if (args.save_strategy == "steps" and regular) or self.control.should_save:
            self.control.should_save = False
            self.save_checkpoint()

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-<step>`; its rollouts not yet used, if any, are not part of it."""
        optimizer = None if self.args.save_only_model else self.updater.optimizer
        path = save_checkpoint(
            self.output_dir,
            self.state.global_step,
            self.model,
            self.processing_class,
            optimizer,
            self._saved_state(),
            self.args.save_total_limit,
        )
        if self.scheduler is not None:
            self.scheduler.checkpointed()
        self._call("on_save")
        return path

    def _saved_state(self) -> dict[str, Any]:
        return {
            "trainer": dataclasses.asdict(self.state),
            "tokens": self._tokens,
            "prompt_sampler": self.prompt_sampler.state_dict(),
            "token_statistics": self.updater.statistics.state_dict(),
            "consults": self.scheduler.state_dict() if self.scheduler else None,
            "consult_counts": dict(self.counts.totals),
            "means": self._means.state_dict(),
            "seconds": dict(self.phases.total),
            "torch_rng": torch.get_rng_state().tolist(),
            "config": self.args.to_dict(),
        }

    def _resume(self, choice: bool | str | Path | None) -> bool:
        if not choice:
            return False
        path = resolve_checkpoint(self.output_dir, choice)
        saved = load_checkpoint(path, self.model, self.updater.optimizer)
        total = self.state.max_steps
        for name, value in saved["trainer"].items():
            if name in ("global_step", "epoch", "log_history"):
                setattr(self.state, name, value)
        self.state.max_steps = total
        self._tokens = saved["tokens"]
        self.prompt_sampler.load_state_dict(saved["prompt_sampler"])
        self.updater.statistics.load_state_dict(saved["token_statistics"])
        self.counts.totals = Counter(saved["consult_counts"])
        self._means.load_state_dict(saved["means"])
        self.phases.total.update(saved["seconds"])
        if self.scheduler is not None and saved["consults"] is not None:
            self.scheduler.load_state_dict(saved["consults"])
        torch.set_rng_state(torch.tensor(saved["torch_rng"], dtype=torch.uint8))
        return True

    def _warn_about_expert(self) -> None:
        problem = self.scheduler.probe() if self.scheduler else None
        if problem:
            problem = problem.rstrip(".")
            self._record.message(
                f"expert: {problem}. Training goes on; consults get the notice until it answers."
            )

    def _epoch(self) -> float:
        rows = len(self.train_rows or ()) or 1
        cycles = self.state.global_step / self.args.steps_per_cycle
        return cycles * self.args.prompts_per_generation / rows

    def _stopped(self) -> bool:
        return bool(self.control.should_training_stop)

    def _call(self, event: str, **keywords: Any) -> None:
        for callback in self.callbacks:
            handler: Callable[..., Any] | None = getattr(callback, event, None)
            if handler is not None:
                handler(
                    self.args,
                    self.state,
                    self.control,
                    model=self.model,
                    processing_class=self.processing_class,
                    **keywords,
                )
