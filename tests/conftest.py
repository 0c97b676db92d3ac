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


_SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}

_MIXED: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

_LATENT: dict[str, Any] = _EXPERTS | {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_CHANGES: dict[str, dict[str, Any]] = {
    "bloom": {"head_dim": None},
    "cohere": {"logit_scale": 0.25},
    "cohere2": _MIXED | {"logit_scale": 0.25},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "exaone4": _MIXED,
    "falcon": {"head_dim": None, "alibi": True, "new_decoder_architecture": False},
    "gemma2": _MIXED
    | {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": _MIXED | {"query_pre_attn_scalar": 16},
    "gemma4_text": _MIXED | {"global_head_dim": 16, "hidden_size_per_layer_input": 8},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": _MIXED | _EXPERTS,
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "llama4_text": _EXPERTS | {"attention_chunk_size": 512, "intermediate_size_mlp": 48},
    "mamba": {"head_dim": None},
    "mistral": {"sliding_window": 6},
    "mixtral": {"sliding_window": 6} | _EXPERTS,
    "olmo3": _MIXED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": 6},
    "phimoe": {"sliding_window": 6} | _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 6},
}
"""What an architecture is about, in small; None takes a setting out."""


@pytest.fixture(scope="session")
def make_model(bpe_tokenizer: Any) -> Callable[..., Any]:
    """Build a random tiny causal LM: `make_model("qwen2")`.

    `spread` draws all matrices and attention sinks with that standard deviation, so that attention
    weighs in; None keeps the architecture's own, nearly uniform initialisation.
    """

    def build(
        kind: str = "qwen2", seed: int = 0, spread: float | None = None, **changes: Any
    ) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "vocab_size": len(bpe_tokenizer),
            "vocab_size_per_layer_input": len(bpe_tokenizer),
            "eos_token_id": bpe_tokenizer.eos_token_id,
            "bos_token_id": bpe_tokenizer.eos_token_id,
            "pad_token_id": bpe_tokenizer.eos_token_id,
        }
        settings |= _SETTINGS | _CHANGES.get(kind, {}) | changes
        config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if v is not None})
        # Not every transformers gives a model with soft caps an attention that has them.
        capped = {"attn_implementation": "eager"} if kind == "gemma2" else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **capped)
        model.generation_config.eos_token_id = bpe_tokenizer.eos_token_id
        if spread is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 or name.endswith("sinks"):
                        parameter.normal_(0.0, spread)
        return model.eval()

    return build
