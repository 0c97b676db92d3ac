"""The sampler against the model's own forward, for several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler, SamplerConfig
from eapo_fast.errors import ConfigError

KINDS = ["qwen2", "qwen3", "llama", "mistral", "gemma2", "olmo2", "granite"]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [40, 41, 42, 43]]


@torch.no_grad()
def full_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits of a whole sequence by the model's ordinary forward, [T, V] float32."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_ordinary_forward(
    kind: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(kind)
    sampler = Sampler(model, config=SamplerConfig(block_size=4, max_prefill_tokens=5))
    params = SamplingParams(max_tokens=23, n=3, seed=11, temperature=0.8)
    for prompt, completions in zip(PROMPTS, sampler.generate(PROMPTS, params), strict=True):
        for done in completions:
            logits = full_logits(model, prompt + done.token_ids)[len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / 0.8, -1)
            got = expected.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(done.logprobs), got, atol=2e-5, rtol=1e-5)
            assert done.kept_mass == [1.0] * len(done.token_ids)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_greedy_equals_argmax_decoding(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind)
    done = Sampler(model).generate(PROMPTS, SamplingParams(max_tokens=15, temperature=0.0))
    for prompt, (completion,) in zip(PROMPTS, done, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            assert int(full_logits(model, ids)[-1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(block_size=3, max_batch=2),
        SamplerConfig(block_size=16, max_prefill_tokens=2),
        SamplerConfig(block_size=4, num_blocks=14),
    ],
    ids=["two-rows-at-once", "prompt-in-chunks-of-2", "pool-of-14-blocks"],
)
def test_tokens_do_not_depend_on_the_engine_shape(
    config: SamplerConfig, make_model: Callable[..., Any]
) -> None:
    model = make_model()
    params = SamplingParams(max_tokens=21, n=4, seed=5)
    expected = Sampler(model).generate(PROMPTS, params, step=7)
    got = Sampler(model, config=config).generate(PROMPTS, params, step=7)
    assert [[c.token_ids for c in g] for g in got] == [[c.token_ids for c in g] for g in expected]


def test_draws_are_keyed_by_prompt_sample_seed_and_step(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    params = SamplingParams(max_tokens=12, n=2, seed=1)
    alone = sampler.generate([PROMPTS[2]], params, prompt_ids=[2], step=3)[0]
    together = sampler.generate(PROMPTS, params, step=3)[2]
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]
    assert alone[0].token_ids != alone[1].token_ids
    other_step = sampler.generate([PROMPTS[2]], params, prompt_ids=[2], step=4)[0]
    assert other_step[0].token_ids != alone[0].token_ids


def test_stop_strings_stop_tokens_and_bans(
    make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    sampler = Sampler(make_model(), bpe_tokenizer)
    free = sampler.generate([PROMPTS[0]], SamplingParams(max_tokens=30, seed=2))[0][0]
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    stopped = sampler.generate(
        [PROMPTS[0]], SamplingParams(max_tokens=30, seed=2, stop_token_ids=[token])
    )[0][0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    text = sampler.vocabulary.text(free.token_ids)  # type: ignore[union-attr]
    written = next(text[i : i + 3] for i in range(len(text)) if text[i : i + 3].isalpha())
    assert written.isascii()
    by_text = sampler.generate([PROMPTS[0]], SamplingParams(max_tokens=30, seed=2, stop=[written]))
    assert written in sampler.vocabulary.text(by_text[0][0].token_ids)  # type: ignore[union-attr]
    banned = sampler.generate(
        [PROMPTS[0]], SamplingParams(max_tokens=30, seed=2, banned_strings=[written], n=4)
    )[0]
    for completion in banned:
        assert written not in sampler.vocabulary.text(completion.token_ids)  # type: ignore[union-attr]


def test_training_attention_is_untouched(make_model: Callable[..., Any]) -> None:
    model = make_model().train()
    before = model.config._attn_implementation
    Sampler(model).generate(PROMPTS, SamplingParams(max_tokens=3))
    assert model.config._attn_implementation == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_bad_requests(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    with pytest.raises(ConfigError, match="prompt 1: 0 tokens"):
        sampler.generate([[1], []], SamplingParams(max_tokens=3))
    with pytest.raises(ConfigError, match="tokenizer"):
        sampler.generate([[1]], SamplingParams(max_tokens=3, stop=["x"]))
    with pytest.raises(ConfigError, match="top_p"):
        SamplingParams(max_tokens=3, top_p=0.0)
