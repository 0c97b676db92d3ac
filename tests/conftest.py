"""Fixtures of all tests: tiny models with a real byte-level BPE tokenizer, `../shared` data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

_CORPUS = [
    "Natalia sold 48 clips in April and half as many in May. How many did she sell? 48/2=24",
    "The answer is \\boxed{72}. <consult><q>48+24</q></consult><advice>unavailable</advice>",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; tests that need it skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no public data sets at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def bpe_tokenizer() -> Any:
    """A byte-level BPE tokenizer with an EOS token and a chat template, trained on two lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def make_model(bpe_tokenizer: Any) -> Callable[..., Any]:
    """Build a random tiny causal LM: `make_model("qwen2")`."""

    def build(kind: str = "qwen2", seed: int = 0, **changes: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "vocab_size": len(bpe_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "eos_token_id": bpe_tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": bpe_tokenizer.eos_token_id,
        }
        config = AutoConfig.for_model(kind, **(settings | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config.eos_token_id = bpe_tokenizer.eos_token_id
        return model.eval()

    return build
