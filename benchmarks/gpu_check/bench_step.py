"""Stage 5: a whole EAPO step of the 0.5B shape, a quarter of whose rollouts ask a 2 s expert.

The model has random weights and a bias on one token, which spells a whole consult block, so that a
known share of the rollouts consult somewhere; each reply takes 2 seconds. After a step that
compiles and captures, one is timed by phase, and one is traced: the GPU is idle where no kernel and
no copy runs. NVML's own utilisation, sampled during the timed step, stands beside it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_check import shapes
from gpu_check.records import Bar, Recorder, Request

IDLE = 0.1
"""Largest idle share of the GPU in a step."""
ASKING = 0.25
"""Share of the rollouts that consult."""
_STEPS = ("warm-up", "timed", "traced")


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
    watch = _Watch(request.device)
    trainer = _trainer(plan, watch, request)
    start = time.perf_counter()
    trainer.train()
    recorder.figure("three steps, with compilation", time.perf_counter() - start, "s")
    rows = [row for row in trainer.state.log_history if "reward" in row]
    _check(rows, plan, recorder)
    _phases(rows[_STEPS.index("timed")], recorder)
    if request.device == "cpu":
        recorder.skip("idle share of the GPU", "there is no GPU")
        return
    bar = Bar("<=", IDLE)
    if watch.idle is None:
        recorder.skip("idle share of the GPU, traced", watch.trouble)
    else:
        recorder.figure("idle share of the GPU, traced", watch.idle, "", bar)
    if watch.busy:
        mean = sum(watch.busy) / len(watch.busy) / 100
        recorder.figure("idle share of the GPU, NVML", 1 - mean, "", bar, samples=len(watch.busy))
    else:
        recorder.skip("idle share of the GPU, NVML", "nvidia-ml-py gave no samples")


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
    """Check that the steps were what they are called before any figure of theirs is shown."""
    rates = [row.get("expert/consult_rate", 0.0) for row in rows]
    accepted = [row.get("expert/accepted_share", 0.0) for row in rows]
    recorder.check(
        "three steps, updated, with consults",
        len(rows) == len(_STEPS) and not any(row.get("skipped") for row in rows) and all(rates),
        consult_rate=rates,
        accepted=accepted,
        loss=[row.get("loss") for row in rows],
        policy_tokens=[row.get("perf/policy_tokens") for row in rows],
        rollouts=plan.rollouts,
    )


def _phases(row: dict[str, float], recorder: Recorder) -> None:
    for name in sorted(k for k in row if k.count("/") == 1 and k.startswith("perf/")):
        if not name.endswith("_s") or name.endswith("per_s"):
            continue
        recorder.figure(f"step, {name.removeprefix('perf/').removesuffix('_s')}", row[name], "s")
    for name in ("perf/sampled_tokens_per_s", "perf/tokens_per_s"):
        if name in row:
            recorder.figure(f"step, {name.removeprefix('perf/')}", row[name], "tokens/s")


class _Watch:
    """A callback: samples NVML during the timed step and traces the last one."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.busy: list[float] = []
        """Percent of the time in which a kernel ran, by NVML."""
        self.idle: float | None = None
        self.trouble = "the profiler saw no kernel"
        """Why there is no idle share."""
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._profiler: Any = None
        self._since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start what belongs to the step."""
        name = _STEPS[state.global_step]
        if not self._on_gpu or name == "warm-up":
            return
        torch.cuda.synchronize()
        if name == "timed":
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        else:
            self._start_trace()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End what belongs to the step."""
        if self._sampler is not None:
            torch.cuda.synchronize()
            self._stop.set()
            self._sampler.join()
            self._sampler = None
        if self._profiler is not None:
            self._end_trace()

    def _start_trace(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        try:
            profiler = profile(activities=[ProfilerActivity.CUDA])
            profiler.__enter__()
        except Exception as error:  # not every machine lets a program trace its kernels
            self.trouble = f"{type(error).__name__}: {error}"
            return
        self._profiler, self._since = profiler, time.perf_counter()

    def _end_trace(self) -> None:
        from torch.autograd import DeviceType  # type: ignore[attr-defined]

        torch.cuda.synchronize()
        wall = time.perf_counter() - self._since
        try:
            self._profiler.__exit__(None, None, None)
            spans = traced_spans(self._profiler, DeviceType.CUDA)
            if spans:
                self.idle = 1 - covered(spans) / 1e9 / wall
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
        self._profiler = None

    def _sample(self) -> None:
        with suppress(Exception):  # no nvidia-ml-py, or a driver that does not tell
            while not self._stop.wait(0.1):
                self.busy.append(float(torch.cuda.utilization()))


def traced_spans(profiler: Any, device: Any) -> list[tuple[float, float]]:
    """Return start and end, in nanoseconds, of what ran on a device, annotations left out.

    The raw events of the trace: a step has a third of a million.
    """
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == device
        and not getattr(event, "is_user_annotation", lambda: False)()
    ]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
