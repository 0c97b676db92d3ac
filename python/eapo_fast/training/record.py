"""What a run leaves behind: metrics, rollouts, curves, the report page and the summary."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from eapo_fast.evaluation import Evaluation
from eapo_fast.reporting import LiveView, MetricsLog, plot_curves, write_report
from eapo_fast.rollout import Rollout
from eapo_fast.training.checkpoint import checkpoints
from eapo_fast.training.consult_log import ConsultLog
from eapo_fast.training.generation import Generation
from eapo_fast.training.scoring import Score

if TYPE_CHECKING:
    from eapo_fast.engine import Vocabulary
    from eapo_fast.trainer import Trainer

_EVAL_ROLLOUTS = 64


class RunRecord:
    """Writes the files of a run and feeds the live view.

    Args:
        trainer: the run.
        resumed: continue the files that are there instead of starting new ones.
    """

    def __init__(self, trainer: Trainer, resumed: bool) -> None:
        self._trainer = trainer
        self.folder: Path = trainer.output_dir
        args = trainer.args
        self._every = (
            args.logging_steps if args.save_rollouts_steps is None else args.save_rollouts_steps
        )
        if not resumed:
            _set_aside(self.folder / "rollouts")
            _set_aside_checkpoints(self.folder)
        step = trainer.state.global_step if resumed else None
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", resume_step=step)
        self.view = LiveView(
            trainer.state.max_steps, args.run_name or self.folder.name, quiet=args.disable_tqdm
        )
        self.consults = ConsultLog(
            self.folder / "consults.jsonl", args.run_name or self.folder.name, resume_step=step
        )
        self._losses: list[float] = []
        self._tick = time.perf_counter()

    def __enter__(self) -> Self:
        self._trainer.phases.drain_step()
        self._scheduler_scope = self._trainer.scheduler
        if self._scheduler_scope is not None:
            self._scheduler_scope.__enter__()
        self.view.__enter__()
        self._tick = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.view.__exit__(kind, error, trace)
        self.metrics.close()
        self.consults.close()
        self._trainer.scorer.close()
        if self._scheduler_scope is not None:
            self._scheduler_scope.__exit__(kind, error, trace)

    def pace(self, generation: Generation) -> dict[str, float]:
        """Return the clock of the generation phase, and what the sampler counted in it."""
        tokens = sum(r.num_policy_tokens for r in generation.rollouts)
        spent = self._trainer.phases.drain_step()
        rate = tokens / max(spent.get("perf/rollout_s", 0.0), 1e-9)
        counters = {f"sampling/{k}": float(v) for k, v in generation.counters.items()}
        return (
            spent
            | {"perf/sampled_tokens_per_s": rate, "perf/policy_tokens": float(tokens)}
            | counters
        )

    def step(self, step: int, metrics: Mapping[str, float], generation: Generation | None) -> None:
        """Take in a finished optimizer step."""
        now = time.perf_counter()
        timing = {"perf/step_s": now - self._tick, **self._trainer.phases.drain_step()}
        if "perf/policy_tokens" in metrics:
            timing["perf/tokens_per_s"] = metrics["perf/policy_tokens"] / (now - self._tick)
        self._tick = now
        self._trainer._means.add(timing)
        self._losses.append(metrics["loss"])
        self.view.step(step, {**metrics, **timing})
        if generation is not None and self._every and step % self._every == 0:
            self._save_rollouts(step, generation)
            if self._trainer.args.log_completions:
                self.message(f"step {step}: {generation.scores[0].text!r}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics."""
        self.metrics.write(step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float], evaluation: Evaluation) -> None:
        """Write an evaluation and some of its rollouts."""
        self.metrics.write(step, metrics)
        self.view.evaluation(step, metrics)
        rows = self._trainer.eval_rows or []
        count = min(_EVAL_ROLLOUTS, len(evaluation.rollouts))
        lines = [
            self._line(step, "eval", evaluation.rollouts[i], evaluation.scores[i], 0.0, rows)
            for i in range(count)
        ]
        self._write_rollouts(f"eval_{step:06d}", lines)
        self._tick = time.perf_counter()

    def message(self, text: str) -> None:
        """Show one line to the user."""
        self.view.message(text)

    def mean_loss(self) -> float:
        """Return the mean loss over the steps of this call."""
        finite = [v for v in self._losses if math.isfinite(v)]
        return sum(finite) / len(finite) if finite else 0.0

    def finish(self) -> dict[str, Any]:
        """Save the model, draw the curves, write summary and report; returns the summary."""
        with self._trainer.phases.measure("other"):
            self._trainer.save_model()
        summary = self.summary()
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        write_report(self.folder)
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the headline numbers of the run."""
        trainer = self._trainer
        evaluations = [e for e in trainer.state.log_history if "eval_solo_accuracy" in e]
        return {
            "run_dir": str(self.folder),
            "model": str(trainer.model.name_or_path),
            "recipe": trainer.recipe.name,
            "seed": trainer.args.seed,
            "steps": trainer.state.global_step,
            "solo_before": _accuracy([e for e in evaluations if e["step"] == 0]),
            "solo_after": _accuracy([e for e in evaluations if e["step"] > 0]),
            "consults": trainer.counts.summary(),
            "seconds": _seconds(trainer.phases.total),
        }

    def _save_rollouts(self, step: int, generation: Generation) -> None:
        trainer = self._trainer
        rows = trainer.train_rows or []
        lines = [
            self._line(step, "train", r, generation.scores[i], generation.advantages[i], rows)
            for i, r in enumerate(generation.rollouts)
        ]
        self._write_rollouts(f"step_{step:06d}", lines)

    def _write_rollouts(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        folder = self.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def _line(
        self,
        step: int,
        split: str,
        rollout: Rollout,
        score: Score,
        advantage: float,
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        vocabulary = self._trainer.sampler.vocabulary
        assert vocabulary is not None
        index = rollout.prompt_id if split == "train" else rollout.group_id
        return {
            "step": step,
            "split": split,
            "prompt_index": index,
            "group": rollout.group_id,
            "sample": rollout.sample_index,
            "prompt": vocabulary.plain_text(rollout.prompt_ids),
            "answer": str(rows[index].get("answer", "")),
            "reward": score.reward if math.isfinite(score.reward) else None,
            "rewards": score.parts,
            "advantage": advantage,
            "accuracy": score.accuracy,
            "finish_reason": rollout.finish_reason,
            "segments": _segments(rollout, vocabulary),
            "consults": _consults(rollout),
        }


def _segments(rollout: Rollout, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "kind": s.kind,
            "turn": s.turn,
            "text": vocabulary.plain_text(rollout.token_ids[s.start : s.stop].tolist()),
            "tokens": s.stop - s.start,
        }
        for s in rollout.segments
    ]


def _consults(rollout: Rollout) -> list[dict[str, Any]]:
    return [
        {
            "query": request.query,
            "status": result.status,
            "text": result.text,
            "latency": result.latency,
            "turn": request.turn,
            "index": request.index,
        }
        for request, result in zip(rollout.requests, rollout.consults, strict=True)
    ]


def _accuracy(evaluations: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Return the last evaluation's accuracy with its interval, None if there was none."""
    if not evaluations:
        return None
    metrics = evaluations[-1]
    names = {"accuracy": "", "low": "_low", "high": "_high"}
    values = {k: metrics[f"eval_solo_accuracy{suffix}"] for k, suffix in names.items()}
    return values | {"n": metrics["eval_solo_n"]}


def _seconds(total: Mapping[str, float]) -> dict[str, float]:
    known = {n: total.get(n, 0.0) for n in ("setup", "rollout", "reward", "update", "evaluation")}
    whole = max(total.get("total", 0.0) + known["setup"], sum(known.values()))
    return known | {"other": whole - sum(known.values()), "total": whole}


def _set_aside_checkpoints(folder: Path) -> None:
    """Keep an earlier run's checkpoints where neither clean-up nor resuming looks."""
    for old in checkpoints(folder):
        kept = folder / "checkpoints.old" / old.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        old.rename(kept)


def _set_aside(folder: Path) -> None:
    """Keep the rollouts of an earlier run under another name, as metrics.jsonl is kept."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
