"""Stage 5: a whole EAPO step of the 0.5B shape, a quarter of whose rollouts ask a 2 s expert.

The model has random weights and a bias on one token, which spells a whole consult block, so that a
known share of the rollouts consult somewhere; each reply takes 2 seconds. After a step that
compiles and captures, one is timed by phase, and one is traced (`gpu_check.trace`). A trace slows a
step down, but not its kernels: the idle share is the traced step's kernel time over the time of the
timed step. NVML's own utilisation, sampled during the timed step, stands beside it. What a step
showed is written down when it ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_check import shapes, trace
from gpu_check.records import Bar, Recorder, Request

IDLE = 0.1
"""Largest idle share of the GPU in a step."""
ASKING = 0.25
"""Share of the rollouts that consult."""
_STEPS = ("warm-up", "timed", "traced")
_TRACE_TAKES = 2.0, 12.0
"""Time that a traced step may take: this many timed ones, and seconds on top."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the step."""

    shape: str
    rollouts: int
    prompt: int
    new: int
    wait: float
    """Seconds of a reply."""


FULL = Plan("0.5B", 256, 256, 1024, 2.0)
SMALL = Plan("tiny", 16, 12, 24, 0.05)


def run(request: Request, recorder: Recorder) -> None:
    """Train three steps and write down their phases and the GPU's idle share."""
    plan = SMALL if request.small else FULL
    start = time.perf_counter()
    watch = _Watch(request, recorder)
    trainer = _trainer(plan, watch, request)
    recorder.figure("model and trainer made in", time.perf_counter() - start, "s")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    _check(rows, plan, recorder)
    if request.device == "cpu":
        recorder.skip("idle share of the GPU", "there is no GPU")


def _trainer(plan: Plan, watch: _Watch, request: Request) -> Any:
    from eapo_fast import EAPOConfig, Trainer
    from eapo_fast.experts import Function

    tokenizer = shapes.byte_tokenizer()
    model = shapes.qwen2(plan.shape, request.device, torch.float32, tied=False)
    token = tokenizer.convert_tokens_to_ids(shapes.CONSULT)
    shapes.consulting_head(model, token, 1 - (1 - ASKING) ** (1 / plan.new))

    async def answer(_: Any) -> str:
        await asyncio.sleep(plan.wait)
        return "It is two, and here are some more words, as an expert would write them."

    config = EAPOConfig(
        output_dir=str(Path(request.work) / "step"),
        max_steps=len(_STEPS),
        per_device_train_batch_size=plan.rollouts,
        num_generations=8,
        max_completion_length=plan.new,
        sampler_max_batch=plan.rollouts,
        max_turns=2,
        expert_dedup="off",
        turn_contraction=0.0,
        consult_schedule="constant",
        consult_prompt="",
        learning_rate=1e-7,
        logging_steps=1,
        save_strategy="no",
        save_rollouts_steps=0,
        disable_tqdm=True,
        seed=request.seed % 2**31,
    )
    letters = "abcdefghijklmnopqrstuvwxyz "
    generator = torch.Generator().manual_seed(request.seed)
    picked = torch.randint(len(letters), (64, plan.prompt), generator=generator).tolist()
    rows = [{"prompt": "".join(letters[i] for i in row)} for row in picked]
    return Trainer(
        model,
        [_reward],
        config,
        rows,
        processing_class=tokenizer,
        expert=Function(answer),
        callbacks=[watch],
    )


def _reward(completions: Iterable[Any], **_: Any) -> list[float]:
    """Return rewards that differ inside every group."""
    return [float(len(str(text)) % 7) for text in completions]


def _check(rows: list[dict[str, float]], plan: Plan, recorder: Recorder) -> None:
    """Check that the steps were what they are called."""
    rates = [row.get("expert/consult_rate", 0.0) for row in rows]
    accepted = [row.get("expert/accepted_share", 0.0) for row in rows]
    recorder.check(
        "steps updated the policy, with consults",
        len(rows) > 1 and not any(row.get("skipped") for row in rows) and all(rates),
        consult_rate=rates,
        accepted=accepted,
        loss=[row.get("loss") for row in rows],
        policy_tokens=[row.get("perf/policy_tokens") for row in rows],
        rollouts=plan.rollouts,
    )


def _phases(row: Mapping[str, float], recorder: Recorder) -> None:
    for name in sorted(k for k in row if k.count("/") == 1 and k.startswith("perf/")):
        if not name.endswith("_s") or name.endswith("per_s"):
            continue
        recorder.figure(f"step, {name.removeprefix('perf/').removesuffix('_s')}", row[name], "s")
    for name in ("perf/sampled_tokens_per_s", "perf/tokens_per_s"):
        if name in row:
            recorder.figure(f"step, {name.removeprefix('perf/')}", row[name], "tokens/s")


class _Watch:
    """A callback: samples NVML during the timed step, traces the last one, writes down each."""

    def __init__(self, request: Request, recorder: Recorder) -> None:
        self._request, self._recorder = request, recorder
        self._on_gpu = request.device == "cuda"
        self.busy: list[float] = []
        """Percent of the time in which a kernel ran, by NVML."""
        self._name = ""
        self._since = 0.0
        self._wall: dict[str, float] = {}
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start what belongs to the step."""
        self._name = _STEPS[state.global_step]
        if self._on_gpu:
            torch.cuda.synchronize()
        if self._on_gpu and self._name == "timed":
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        if self._on_gpu and self._name == "traced":
            with self._recorder.guard("trace of a step", optional=True):
                self._profiler = trace.started()
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End what belongs to the step."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._wall[self._name] = time.perf_counter() - self._since
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._sampler = None
        if self._profiler is not None:
            with self._recorder.guard("trace of a step", optional=True):
                found = trace.ended(self._profiler)
                trace.write(found, self._wall["traced"], self._recorder)
                self._idle(found.busy)
            self._profiler = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any
    ) -> None:
        """Write down the step that ended; ends the run where there is no time for a trace."""
        if self._name == "warm-up":
            self._recorder.figure("first step, with compilation", self._wall["warm-up"], "s")
        if self._name != "timed":
            return
        _phases(logs, self._recorder)
        self._recorder.note("the timed step", metrics=dict(logs))
        if self.busy:
            idle = 1 - sum(self.busy) / len(self.busy) / 100
            count = len(self.busy)
            self._recorder.figure(
                "idle share of the GPU, NVML", idle, "", Bar("<=", IDLE), samples=count
            )
        elif self._on_gpu:
            self._recorder.skip("idle share of the GPU, NVML", "nvidia-ml-py gave no samples")
        times, more = _TRACE_TAKES
        if self._on_gpu and self._request.remaining() < times * self._wall["timed"] + more:
            self._recorder.skip("trace of a step", "the time box is used up")
            control.should_training_stop = True

    def _idle(self, busy: float) -> None:
        self._recorder.figure(
            "idle share of the GPU, kernels over the timed step",
            1 - busy / self._wall["timed"],
            "",
            Bar("<=", IDLE),
            kernels_s=busy,
            timed_s=self._wall["timed"],
            traced_s=self._wall["traced"],
        )

    def _sample(self) -> None:
        with suppress(Exception):  # no nvidia-ml-py, or a driver that does not tell
            while not self._stop.wait(0.1):
                self.busy.append(float(torch.cuda.utilization()))
