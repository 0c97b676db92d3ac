"""Stage 4: a short EAPO training of the demo's policy, on the device and on the CPU.

Prompts, draws and the expert's replies have equal keys on both sides, so the first step differs by
rounding alone; later steps differ where rounding moved a sampled token. `BOUNDS` says by how much.
On a CPU the second run packs its micro-batches differently, which rounds differently too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.records import Recorder, Request


@dataclass(frozen=True)
class Bounds:
    """How far two curves of 128 rollouts a step may lie apart."""

    first: Mapping[str, float]
    """Differences of the first step."""
    gradient: float
    """Relative difference of the first step's gradient norm."""
    mean: Mapping[str, float]
    """Differences of means over the steps."""


BOUNDS = {
    # Rounding moves a draw in a million: at most one rollout of the first step goes another way.
    # (On a CPU, other micro-batches left all tokens of 10 steps alone.)
    "float32": Bounds(
        {"reward": 0.01, "completions/mean_length": 0.6, "expert/consult_rate": 0.03},
        0.02,
        {"reward": 0.03, "entropy": 0.02},
    ),
    # Five times what bfloat16 on a CPU showed: 0.007, 0.12, 0.008; 7 %; 0.006 and 0.005 (the
    # gradient norm and the means: three to four times).
    "bfloat16": Bounds(
        {"reward": 0.04, "completions/mean_length": 1.5, "expert/consult_rate": 0.05},
        0.2,
        {"reward": 0.025, "entropy": 0.02},
    ),
}

Curve = list[dict[str, float]]


def run(request: Request, recorder: Recorder) -> None:
    """Train on both sides, side by side where there is a GPU, and compare."""
    steps = 2 if request.small else 10
    folder = Path(request.work)
    reference = _start(folder / "reference", "cpu", steps, request, micro_batch_tokens=4096)
    other = {"micro_batch_tokens": 1500} if request.device == "cpu" else {}
    if request.device == "cpu":
        _wait(reference, request)
    tested = _start(folder / "tested", request.device, steps, request, **other)
    low = None
    if request.device == "cuda":
        low = _start(folder / "bfloat16", "cuda", steps, request, bf16=True)
    curve = _wait(tested, request)
    want = _wait(reference, request)
    compare(curve, want, "float32", recorder)
    _figures(curve, request.device, recorder)
    if low is not None:
        with recorder.guard("training, bfloat16"):
            curve = _wait(low, request)
            compare(curve, want, "bfloat16", recorder)
            _figures(curve, f"{request.device}, bfloat16", recorder)


def compare(got: Curve, want: Curve, name: str, recorder: Recorder) -> None:
    """Check that two curves agree within the bounds of `name`."""
    bounds = BOUNDS[name]
    recorder.check(
        f"training, {name}: as many steps, all of them finite",
        len(got) == len(want) > 0 and not any(row.get("skipped") for row in got),
        steps=[len(got), len(want)],
    )
    if not got or not want:
        return
    for metric, bound in bounds.first.items():
        _near(f"first step, {metric}", got[:1], want[:1], metric, bound, name, recorder)
    first = got[0]["grad_norm"], want[0]["grad_norm"]
    recorder.check(
        f"training, {name}: first step, gradient norm",
        abs(first[0] - first[1]) <= bounds.gradient * first[1],
        got=first[0],
        want=first[1],
    )
    for metric, bound in bounds.mean.items():
        _near(f"mean of all steps, {metric}", got, want, metric, bound, name, recorder)


def _near(
    what: str,
    got: Sequence[Mapping[str, float]],
    want: Sequence[Mapping[str, float]],
    metric: str,
    bound: float,
    name: str,
    recorder: Recorder,
) -> None:
    ours, theirs = (sum(row[metric] for row in rows) / len(rows) for rows in (got, want))
    recorder.check(
        f"training, {name}: {what}", abs(ours - theirs) <= bound, got=ours, want=theirs, bound=bound
    )


def _figures(curve: Curve, name: str, recorder: Recorder) -> None:
    times = sorted(row["perf/step_s"] for row in curve[1:] or curve)
    recorder.figure(f"demo step, {name}", times[len(times) // 2], "s", rewards=_rewards(curve))


def _rewards(curve: Curve) -> list[float]:
    return [round(row["reward"], 4) for row in curve]


def _start(
    folder: Path, device: str, steps: int, request: Request, **settings: Any
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a training in a process of its own; returns it and the file of its curve."""
    small = {"per_device_train_batch_size": 32, "max_completion_length": 60}
    plan = {
        "folder": str(folder),
        "settings": {
            "max_steps": steps,
            "use_cpu": device == "cpu",
            "bf16": False,
            **(small if request.small else {}),
            **settings,
        },
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_check.training", json.dumps(plan)],
        env={**os.environ, **hidden},
    )
    return process, folder / "curve.json"


def _wait(started: tuple[subprocess.Popen[bytes], Path], request: Request) -> Curve:
    """Return the curve of a training when it has ended."""
    process, path = started
    code = process.wait(max(1.0, request.remaining() - 2))
    if code != 0:
        raise RuntimeError(f"the training in {path.parent.name} ended with {code}")
    curve: Curve = json.loads(path.read_text())
    return curve


def _train(plan: Mapping[str, Any]) -> None:
    """Train the demo and write its curve."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    from eapo_fast.demo.run import build_demo_trainer, demo_config

    quiet = {"disable_tqdm": True, "eval_strategy": "no", "eval_on_start": False}
    quiet |= {"save_strategy": "no", "logging_steps": 1, "save_rollouts_steps": 0}
    config = demo_config(output_dir=plan["folder"]).replace(**quiet, **plan["settings"])
    trainer = build_demo_trainer(config, eval_size=8)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    (Path(plan["folder"]) / "curve.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    _train(json.loads(sys.argv[1]))
