"""The demo: a tiny policy learns multi-step arithmetic with an exact calculator as its expert.

    eapo-fast demo

It runs the same `Trainer` as any real model; only model, problems and settings are small.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from eapo_fast.config import EAPOConfig
from eapo_fast.demo import POLICY, settings
from eapo_fast.demo.problems import build_dataset
from eapo_fast.experts import Calculator
from eapo_fast.rollout import ConsultProtocol


def demo_config(
    *, steps: int | None = None, seed: int | None = None, output_dir: str | Path = "runs/demo"
) -> EAPOConfig:
    """Return the demo's settings, with another number of steps, seed or folder."""
    config = EAPOConfig(**settings.CONFIG, output_dir=str(output_dir))
    if seed is not None:
        config = config.replace(seed=seed)
    if steps is not None:
        config = config.replace(max_steps=steps)
    return config


def build_demo_trainer(
    config: EAPOConfig, *, expert: bool = True, eval_size: int | None = None
) -> Any:
    """Return the demo's `Trainer`; without the expert the consult tag is banned throughout."""
    from eapo_fast.trainer import Trainer

    size = settings.EVAL_SIZE if eval_size is None else eval_size
    return Trainer(
        str(POLICY),
        ["exact"],
        config,
        build_dataset("train", settings.TRAIN_SIZE, config.seed, steps=settings.TRAIN_STEPS),
        build_dataset("test", size, settings.EVAL_SEED, steps=settings.EVAL_STEPS),
        expert=Calculator() if expert else None,
        protocol=ConsultProtocol(),
    )


def run_demo(
    steps: int | None = None,
    seed: int | None = None,
    output_dir: str | Path = "runs/demo",
    expert: bool = True,
    quiet: bool = False,
    eval_size: int | None = None,
) -> dict[str, Any]:
    """Train the demo and print what came of it.

    Args:
        steps: optimizer steps; None: the demo's own number.
        seed: seed of problems and draws; None: the demo's own.
        output_dir: where the results go.
        expert: False trains without consults (self-exploration).
        quiet: no live view.
        eval_size: held-apart problems; None: all that the demo uses.

    Returns:
        The run's summary (see `summary.json`).
    """
    from eapo_fast.reporting import print_summary

    started = time.perf_counter()
    config = demo_config(steps=steps, seed=seed, output_dir=output_dir)
    trainer = build_demo_trainer(
        config.replace(disable_tqdm=quiet), expert=expert, eval_size=eval_size
    )
    trainer.phases.total["setup"] += time.perf_counter() - started
    summary: dict[str, Any] = trainer.train().metrics
    print_summary(summary)
    return summary
