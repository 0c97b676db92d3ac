"""The context that a model's configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler
from eapo_fast.engine.limits import NO_LIMIT, context_limit, vocab_size
from eapo_fast.errors import ConfigError, ModelError

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 512 / 24,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [2.0, 2.0, 2.0, 2.0],
        "original_max_position_embeddings": 24,
    },
}


@pytest.mark.parametrize(
    ("kind", "changes", "limit"),
    [
        ("llama", {}, 512),
        ("gpt2", {"max_position_embeddings": None, "n_positions": 40}, 40),
        ("opt", {"max_position_embeddings": 40}, 40),
        ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 300}}, 1200),
        ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}, 512),
        ("llama", {"rope_parameters": LINEAR}, 512),
        ("llama", {"rope_parameters": DYNAMIC}, 512),
        ("phi3", LONGROPE, 24),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {**YARN, "original_max_position_embeddings": 300},
                }
            },
            1200,
        ),
    ],
)
def test_context_limit(
    kind: str, changes: dict[str, Any], limit: int, make_model: Callable[..., Any]
) -> None:
    assert context_limit(make_model(kind, **changes)) == limit


def test_a_model_without_positions_has_no_limit(make_model: Callable[..., Any]) -> None:
    assert context_limit(make_model("bloom", max_position_embeddings=None)) == NO_LIMIT


def test_the_last_position_is_used_and_none_beyond(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2", spread=0.15, max_position_embeddings=40)
    sampler = Sampler(model)
    (((done,)),) = sampler.generate([[7] * 10], SamplingParams(max_tokens=100, seed=2))
    assert done.finish_reason == "length"
    assert len(done.token_ids) == 30
    with pytest.raises(ConfigError, match="context is 40"):
        sampler.generate([[7] * 40], SamplingParams(max_tokens=1))


def test_longrope_ends_where_its_frequencies_change(make_model: Callable[..., Any]) -> None:
    model = make_model("phi3", spread=0.15, **LONGROPE)
    (((done,)),) = Sampler(model).generate([[7] * 5], SamplingParams(max_tokens=100, seed=2))
    assert len(done.token_ids) == 19
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7] * 5 + done.token_ids])).logits[0, 4:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-5, rtol=0.0)


def test_rows_of_the_head(make_model: Callable[..., Any], bpe_tokenizer: Any) -> None:
    model = make_model()
    assert vocab_size(model) == len(bpe_tokenizer)
    with pytest.raises(ModelError, match="Qwen2Model has no LM head"):
        vocab_size(model.model)
