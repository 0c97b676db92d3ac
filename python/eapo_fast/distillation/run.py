"""`distill`: the supervised loop, resumable at every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eapo_fast import ops
from eapo_fast.config import EAPOConfig
from eapo_fast.data import PromptSampler
from eapo_fast.distillation.solutions import load_solutions, prepare
from eapo_fast.engine import Vocabulary
from eapo_fast.engine.limits import context_limit, vocab_size
from eapo_fast.errors import ConfigError
from eapo_fast.evaluation.folder import claim, read_json, write_json
from eapo_fast.evaluation.settings import json_digest, model_digest
from eapo_fast.reporting.metrics import MetricsLog, read_jsonl
from eapo_fast.rollout import Rollout
from eapo_fast.training.arguments import for_device
from eapo_fast.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from eapo_fast.training.optimizer import LearningRate, build_optimizer
from eapo_fast.training.packing import micro_batches
from eapo_fast.training.policy import Policy
from eapo_fast.training.setup import load_model, load_tokenizer, with_adapter

_WARMUP = 0.03
_CHECKPOINTS_KEPT = 2
_SUMMARY, _METRICS, _FINAL, _ADAPTER = "summary.json", "metrics.jsonl", "final", "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillSettings:
    """How a student is fine-tuned."""

    epochs: float = 3.0
    """Passes over the solutions."""
    max_steps: int | None = None
    """Optimizer steps; None: from `epochs`."""
    batch_size: int = 32
    """Solutions of one step."""
    learning_rate: float | None = None
    """Peak of AdamW's rate: linear warm-up over 3 % of the steps, then a cosine to 0; None: 1e-5,
    for an adapter 1e-4."""
    lora: int | None = None
    """Rank of an adapter on every linear layer of the trunk (alpha is twice that); None: all
    weights are trained."""
    max_length: int | None = None
    """Most tokens of prompt and solution; None: the model's context."""
    save_steps: int = 50
    """Steps between checkpoints, which is what an interruption can lose."""
    seed: int = 0
    """Order of the solutions and first weights of an adapter."""
    system_prompt: str | None = None
    """System text before every problem."""
    micro_batch_tokens: int | None = None
    """Tokens of one packed forward; changes memory and speed only. None: by device."""

    def __post_init__(self) -> None:
        least = {"max_steps": 1, "batch_size": 1, "lora": 1, "max_length": 2, "save_steps": 1}
        for name, allowed in least.items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise ConfigError(f"{name}: got {value}, allowed is {allowed} or more")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value}, allowed is a finite number above 0")

    @property
    def peak_rate(self) -> float:
        """Learning rate after the warm-up."""
        return self.learning_rate or (1e-4 if self.lora else 1e-5)


def distill(
    model: str | Path | PreTrainedModel,
    data: Any,
    out: str | Path,
    settings: DistillSettings | None = None,
    *,
    processing_class: Any | None = None,
    restart: bool = False,
    use_cpu: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on solutions.

    The loss is the mean over the solution tokens of a step of -ln p(token), prompts excluded,
    straight from hidden states (`ops.linear_token_stats`). `out` gets `metrics.jsonl`,
    `summary.json` and `final/`, a whole transformers directory also for an adapter (merged; the
    adapter alone is in `adapter/`); until that is written, `checkpoint-<step>`. A call with the
    same arguments continues from the last checkpoint, with the same numbers as an uninterrupted
    one; a finished one returns its summary.

    Args:
        model: transformers directory or hub id, or the model itself (changed in place).
        data: see `load_solutions`.
        out: folder of the run.
        settings: None: the defaults.
        processing_class: tokenizer; None: the one beside the model.
        restart: set an earlier run in `out` aside and begin anew.
        use_cpu: stay on the CPU even when a GPU is there.
        progress: called with a line of text now and then.

    Returns:
        steps, solutions, tokens, first and last loss, trainable parameters, seconds, final.

    Raises:
        ConfigError, DataError, ModelError: before the first step.
    """
    settings = settings or DistillSettings()
    run = _Run(model, data, settings, processing_class, use_cpu)
    folder = Path(out)
    own = (_SUMMARY, _METRICS, _FINAL, _ADAPTER, *(p.name for p in checkpoints(folder)))
    with claim(folder, run.identity, own, "distillation", restart=restart):
        if not (folder / _SUMMARY).is_file():
            write_json(folder / _SUMMARY, run.train(folder, progress or (lambda line: None)))
        for old in checkpoints(folder):
            shutil.rmtree(old)
        return read_json(folder / _SUMMARY)


class _Run:
    """Student, solutions and optimizer."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        data: Any,
        settings: DistillSettings,
        tokenizer: Any | None,
        use_cpu: bool,
    ) -> None:
        self.settings = settings
        solutions = load_solutions(data)
        args = EAPOConfig(
            use_cpu=use_cpu,
            learning_rate=settings.peak_rate,
            micro_batch_tokens=settings.micro_batch_tokens,
        )
        loaded = load_model(model, args)
        self.args = for_device(args, loaded.device)
        widest = int(loaded.config.get_text_config().hidden_size)
        if settings.lora and settings.lora > widest:
            raise ConfigError(
                f"lora: got rank {settings.lora}, allowed is at most the model's width {widest}"
            )
        self.tokenizer = load_tokenizer(tokenizer, loaded)
        context = context_limit(loaded)
        limit = min(settings.max_length or context, context)
        self.rollouts = prepare(
            solutions,
            self.tokenizer,
            Vocabulary(self.tokenizer, vocab_size(loaded)),
            system=settings.system_prompt,
            max_length=limit,
        )
        pairs = [[r.prompt_ids, r.token_ids.tolist()] for r in self.rollouts]
        self.identity = dataclasses.asdict(settings) | {
            "model": model_digest(loaded, self.tokenizer),
            "data": json_digest(pairs),
        }
        torch.manual_seed(settings.seed)
        self.model = with_adapter(loaded, _lora(settings.lora), self.args)
        self.policy = Policy(self.model)
        self.optimizer = build_optimizer(self.model, self.args)
        batch = min(settings.batch_size, len(self.rollouts))
        self.order = PromptSampler(len(self.rollouts), batch, settings.seed)
        self.steps = settings.max_steps or max(
            1, math.ceil(settings.epochs * self.order.batches_per_epoch)
        )
        warmup = math.ceil(_WARMUP * self.steps)
        self.rate = LearningRate(settings.peak_rate, "cosine", warmup, self.steps)

    def train(self, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        """Run to the last step and write the final model; returns the summary."""
        done = self._resume(folder)
        started = time.perf_counter()
        if done:
            tell(f"continuing after step {done} of {self.steps}")
        every = max(1, self.steps // 20)
        with MetricsLog(folder / _METRICS, resume_step=done or None) as log:
            for step in range(done + 1, self.steps + 1):
                metrics = self._step(step)
                log.write(step, metrics)
                if step % every == 0 or step == self.steps:
                    tell(f"step {step}/{self.steps}  loss {metrics['loss']:.4f}")
                if step % self.settings.save_steps == 0 or step == self.steps:
                    self._save(folder, step)
        self._save_final(folder)
        return self._summary(folder, time.perf_counter() - started)

    def _step(self, step: int) -> dict[str, float]:
        batch = [self.rollouts[i] for i in self.order.next()]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = self._backward(batch)
        trainable = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, self.args.max_grad_norm))
        rate = self.rate.at(step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": float(tokens),
            "skipped": 0.0 if finite else 1.0,
        }

    def _backward(self, batch: Sequence[Rollout]) -> tuple[float, int]:
        """Add up the gradient; returns the loss in nats per token, and the tokens."""
        tokens = sum(r.num_policy_tokens for r in batch)
        budget = self.args.micro_batch_tokens
        assert budget is not None
        total = 0.0
        for part in micro_batches(
            batch, [0.0] * len(batch), token_budget=budget, device=self.policy.device
        ):
            with self.policy.attention(part.row):  # type: ignore[attr-defined]
                with torch.autocast(
                    self.policy.device.type, torch.bfloat16, enabled=bool(self.args.bf16)
                ):
                    hidden = self.policy.hidden(part.input_ids, part.position_ids, part.row)
                stats = ops.linear_token_stats(
                    hidden.index_select(0, part.rows).to(self.policy.weight.dtype),
                    self.policy.weight,
                    part.targets,
                    bias=self.policy.bias,
                    temperature=1.0 / self.policy.logit_scale,
                    softcap=self.policy.softcap,
                )
                loss = -stats.logprob.sum() / tokens
                loss.backward()
            total += float(loss.detach())
            if not math.isfinite(total):
                stats.check()
        return total, tokens

    def _resume(self, folder: Path) -> int:
        """Restore the last checkpoint; returns its step, 0 without one."""
        found = checkpoints(folder)
        if not found:
            return 0
        state = load_checkpoint(found[-1], self.model, self.optimizer)
        self.order.load_state_dict(state["order"])
        return int(state["step"])

    def _save(self, folder: Path, step: int) -> None:
        state = {"step": step, "order": self.order.state_dict()}
        save_checkpoint(
            folder, step, self.model, self.tokenizer, self.optimizer, state, _CHECKPOINTS_KEPT
        )

    def _save_final(self, folder: Path) -> None:
        """Write `final/`, which appears when it is whole; an adapter is merged into it."""
        plain: Any = self.model
        if self.settings.lora:
            shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
            save_model(self.model, self.tokenizer, folder / _ADAPTER)
            plain = self.model.merge_and_unload()
        partial = folder / f".{_FINAL}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_model(plain.eval(), self.tokenizer, partial)
        shutil.rmtree(folder / _FINAL, ignore_errors=True)
        partial.rename(folder / _FINAL)

    def _summary(self, folder: Path, seconds: float) -> dict[str, Any]:
        rows = read_jsonl(folder / _METRICS)
        tenth = max(1, len(rows) // 10)
        first, last = ([r["loss"] for r in part] for part in (rows[:tenth], rows[-tenth:]))
        return {
            "steps": self.steps,
            "solutions": len(self.rollouts),
            "tokens": int(sum(r["tokens"] for r in rows)),
            "skipped_steps": int(sum(r["skipped"] for r in rows)),
            "loss_first": _mean(first),
            "loss_last": _mean(last),
            "trained": "adapter" if self.settings.lora else "all weights",
            "seconds": seconds,
            "final": str(folder / _FINAL),
        }


def _lora(rank: int | None) -> Any | None:
    if rank is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora needs the package peft: pip install peft") from error
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
