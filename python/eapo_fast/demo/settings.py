"""Settings of the demo; the comments say what other values did."""

from __future__ import annotations

from typing import Any

TRAIN_STEPS = EVAL_STEPS = (4, 8)
"""Fewest and most steps of a problem."""
TRAIN_SIZE = 1920
"""Train problems: none is seen twice in 120 steps of 16."""
EVAL_SIZE = None
"""Held-apart problems; None: all 231."""
EVAL_SEED = 0
"""Order of the held-apart problems."""

CONFIG: dict[str, Any] = {
    "recipe": "eapo",
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "lr_scheduler_type": "constant",
    "max_steps": 120,
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "temperature": 1.0,
    "max_completion_length": 140,
    "max_turns": 4,
    "turn_contraction": 0.5,
    "consult_schedule": "inverse",
    "consult_schedule_offset": 20,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "eval_on_start": True,
    "eval_temperature": 1.0,
    "logging_steps": 1,
    "save_rollouts_steps": 10,
    "seed": 0,
}
"""Fields of EAPOConfig."""
