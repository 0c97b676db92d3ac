"""EAPO against the same trainer without an expert: same steps, batch, problems and seeds.

    eapo-fast compare [--seeds 0 1 2] [--steps N] [--out runs/compare] [--report docs/results]

Both sides sample and train under one distribution: where no consult is possible, the opening tag
has probability 0 in sampling and in the loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.demo import POLICY
from eapo_fast.reporting.metrics import read_jsonl

SIDES = {"eapo": "EAPO", "alone": "no expert"}
_MARKS = 6
_MARK = "compared"


@dataclass(frozen=True, slots=True)
class Curve:
    """Solo accuracy of one run."""

    steps: list[int]
    seconds: list[float]
    """Training time up to each evaluation, evaluations left out."""
    accuracy: list[float]

    def at_step(self, step: int) -> float:
        """Return the accuracy of the last evaluation at or before `step`."""
        return self.accuracy[max(i for i, s in enumerate(self.steps) if s <= step)]

    def at_time(self, seconds: float) -> float:
        """Return the accuracy of the last evaluation at or before `seconds` of training."""
        return self.accuracy[max(i for i, t in enumerate(self.seconds) if t <= seconds)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and write its report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="eapo-fast compare", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--report", type=Path, default=Path("docs/results"))
    options = parser.parse_args(argv)
    curves = {
        side: [run(side, seed, options.steps, options.out) for seed in options.seeds]
        for side in SIDES
    }
    path = write(curves, options.seeds, options.report, _conditions(options.out, options.seeds))
    print(f"written: {path}")
    return 0


def run(side: str, seed: int, steps: int | None, out: Path) -> Curve:
    """Train one side with one seed (or read the run that is already complete)."""
    from eapo_fast.demo.run import build_demo_trainer, demo_config

    folder = out / f"{side}-{seed}"
    config = demo_config(steps=steps, seed=seed, output_dir=folder)
    config = config.replace(run_name=f"{SIDES[side]}, seed {seed}")
    mark = _fingerprint(config)
    if not _complete(folder, mark):
        build_demo_trainer(config, expert=side == "eapo").train()
        (folder / _MARK).write_text(mark)
    return read_curve(folder)


def read_curve(folder: Path) -> Curve:
    """Read a run's solo accuracy over steps and over training time."""
    steps, seconds, accuracy = [], [], []
    spent, done = 0.0, 0
    for row in read_jsonl(folder / "metrics.jsonl"):
        if "perf/step_s" in row:
            spent += row["perf/step_s"] * (row["step"] - done)
            done = row["step"]
        if "eval_solo_accuracy" in row:
            steps.append(row["step"])
            seconds.append(spent)
            accuracy.append(row["eval_solo_accuracy"])
    return Curve(steps, seconds, accuracy)


def write(
    curves: Mapping[str, Sequence[Curve]],
    seeds: Sequence[int],
    folder: Path,
    conditions: Mapping[str, Any],
) -> Path:
    """Write `compare.md` and `compare.png` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [c for side in curves.values() for c in side]
    last = min(c.steps[-1] for c in every)
    marks = sorted({s for c in every for s in c.steps if s <= last})
    marks = _thinned(marks, _MARKS)
    longest = min(c.seconds[-1] for c in every)
    times = [longest * k / (_MARKS - 1) for k in range(_MARKS)]
    _draw(curves, folder / "compare.png")
    page = folder / "compare.md"
    facts = "\n".join(f"- {name}: {value}" for name, value in conditions.items())
    page.write_text(
        f"# EAPO against the same trainer without an expert\n\n"
        f"Solo accuracy on held-apart problems, in per cent: mean over seeds "
        f"{', '.join(map(str, seeds))} and, in brackets, the lowest and the highest seed. "
        f"Made by `make compare`.\n\n{facts}\n\n"
        f"## At equal steps\n\n{_table('step', marks, curves, Curve.at_step, '{:.0f}')}\n"
        f"## At equal training time\n\n"
        f"{_table('seconds', times, curves, Curve.at_time, '{:.0f}')}\n"
        f"![solo accuracy over steps and over time](compare.png)\n"
    )
    return page


def _fingerprint(config: EAPOConfig) -> str:
    """Digest of settings and policy weights: a finished run counts only if both are the same."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    digest.update((POLICY / "model.safetensors").read_bytes())
    return digest.hexdigest()


def _complete(folder: Path, mark: str) -> bool:
    path = folder / _MARK
    return path.is_file() and path.read_text() == mark


def _conditions(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    import torch

    from eapo_fast import _core
    from eapo_fast.demo import settings

    first = json.loads((out / f"eapo-{seeds[0]}" / "summary.json").read_text())
    totals = {
        label: statistics.fmean(
            json.loads((out / f"{side}-{s}" / "summary.json").read_text())["consults"]["sent"]
            for s in seeds
        )
        for side, label in SIDES.items()
    }
    batch = settings.CONFIG
    return {
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()} with "
        f"{_core.isa()}, torch {torch.__version__}",
        "steps": first["steps"],
        "rollouts per step": batch["per_device_train_batch_size"],
        "rollouts per prompt": batch["num_generations"],
        "held-apart problems": int(first["solo_before"]["n"]),
        "sampling": f"temperature {batch['eval_temperature']}, as in training",
        "consults bought per run": ", ".join(f"{k} {v:.0f}" for k, v in totals.items()),
    }


def _table(
    head: str, marks: Sequence[float], curves: Mapping[str, Sequence[Curve]], read: Any, form: str
) -> str:
    lines = [
        "| " + " | ".join([head, *(SIDES[s] for s in curves)]) + " |",
        "|---" * (len(curves) + 1) + "|",
    ]
    for mark in marks:
        cells = [_spread([read(c, mark) for c in runs]) for runs in curves.values()]
        lines.append("| " + " | ".join([form.format(mark), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def _thinned(marks: Sequence[int], count: int) -> list[int]:
    if len(marks) <= count:
        return list(marks)
    return [marks[round(i * (len(marks) - 1) / (count - 1))] for i in range(count)]


def _draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name, unit in zip(panels, ("steps", "seconds"), ("step", "s"), strict=True):
        for color, (side, runs) in zip(("#1f6feb", "#9a6700"), curves.items(), strict=True):
            for index, curve in enumerate(runs):
                panel.plot(
                    getattr(curve, name),
                    [100 * a for a in curve.accuracy],
                    color=color,
                    alpha=0.75,
                    label=SIDES[side] if index == 0 else None,
                )
        panel.set_xlabel(unit if name == "steps" else "training time (s)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("solo accuracy (%)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
