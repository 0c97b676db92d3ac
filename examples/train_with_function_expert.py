"""The Python way: your own reward and your own expert, in one screen.

python examples/train_with_function_expert.py path/to/model path/to/problems.jsonl
"""

from __future__ import annotations

import sys
from typing import Any

from eapo_fast import ConsultRequest, EAPOConfig, Trainer, experts, rewards


def expert(request: ConsultRequest) -> str:
    """Answer one query; called in a thread, so it may take its time."""
    return f"Split the problem into steps and check each one: {request.query}"


def short_and_right(*, completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """One point for a right answer, half of it when the text is long."""
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        right = rewards.verify(text, gold).status == "correct"
        scores.append(float(right) * (1.0 if len(text) < 400 else 0.5))
    return scores


def main(model: str, data: str) -> None:
    """Train `model` on the JSONL file `data`."""
    trainer = Trainer(
        model,
        short_and_right,
        EAPOConfig(output_dir="runs/example", max_steps=20, logging_steps=1),
        train_dataset=data,
        expert=experts.Function(expert),
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:3])
