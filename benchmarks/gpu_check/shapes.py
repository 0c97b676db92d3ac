"""Random-weight models of Qwen2.5's shapes, and a tokenizer whose one token is a whole consult."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 320,
    },
}
"""Sizes of Qwen2.5 as transformers names them, and a small one."""

CONSULT = "<consult><q>1+1</q></consult>"
"""What the model writes when it consults."""


def qwen2(shape: str, device: str, dtype: torch.dtype, *, tied: bool = True) -> Any:
    """Return a random model of a shape, without stop tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    return model.to(dtype).eval()


def consulting_head(model: Any, token: int, probability: float) -> None:
    """Give the head a bias by which `token` has about this probability at every position.

    Logits of a random model of standard deviation s sum to V exp(s^2 / 2), s = 0.02 sqrt(H).
    """
    import math

    config, old = model.config, model.lm_head
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=True).to(old.weight)
    variance = (0.02**2) * config.hidden_size
    level = math.log(config.vocab_size) + variance / 2 + math.log(probability)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.weight[token] = 0.0
        head.bias.zero_()
        head.bias[token] = level
    model.lm_head = head
    model.config.tie_word_embeddings = False


def byte_tokenizer() -> Any:
    """Return a byte-level tokenizer with an end token and `CONSULT` as one ordinary token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    core.add_tokens([AddedToken(CONSULT, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
