"""Training a LoRA adapter: the adapter learns, the base stays, a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_fast import EAPOConfig, Trainer

peft = pytest.importorskip("peft")

ROWS = [{"problem": f"What is {a}+{a}?", "answer": str(2 * a)} for a in range(2, 14)]


def letters(completions: list[Any], **_: Any) -> list[float]:
    """Share of ASCII letters."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x.isascii() and x.isalpha() for x in t) / max(1, len(t)) for t in texts]


def build(folder: Path, model: Any, tokenizer: Any) -> Trainer:
    args = EAPOConfig(
        output_dir=str(folder),
        recipe="grpo",
        learning_rate=1e-2,
        warmup_steps=0,
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=4,
        max_completion_length=12,
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Trainer(model, letters, args, ROWS, None, tokenizer, peft_config=lora)


def test_only_the_adapter_learns_and_the_sampler_sees_it(
    make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(tmp_path / "run", make_model(), bpe_tokenizer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name), name
    worst = max(row["sampling/sampling_logp_difference/max"] for row in trainer.state.log_history)
    assert worst < 1e-5
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_resumed_adapter_run_is_the_same_run(
    make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    whole = build(tmp_path / "whole", make_model(), bpe_tokenizer)
    whole.train()
    resumed = build(tmp_path / "whole2", make_model(), bpe_tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
