"""Architectures on paged attention, against their own `generate` and ordinary forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler, SamplerConfig
from eapo_fast.engine.support import paged_model
from eapo_fast.errors import ModelError
from eapo_fast.ops import linear_token_stats
from eapo_fast.training.attention import PackedRow
from eapo_fast.training.policy import Policy

KINDS = [
    "biogpt",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
]
NEW = 20
PROMPTS = [
    [5, 6, 7],
    [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 40, 41, 42, 43, 90, 91],
    [40, 41, 42, 43, 44, 100],
]


def own_tokens(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens of the model's own `generate`."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def own_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probs of `tokens` by the model's ordinary forward, float64."""
    logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_generates_and_logprobs_the_forwards(
    kind: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(kind, spread=0.15)
    sampler = Sampler(model, config=SamplerConfig(block_size=4, max_prefill_tokens=5))
    done = sampler.generate(PROMPTS, SamplingParams(max_tokens=NEW, temperature=0.0))
    for prompt, (completion,) in zip(PROMPTS, done, strict=True):
        assert completion.token_ids == own_tokens(model, prompt)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, dtype=torch.float64),
            own_logprobs(model, prompt, completion.token_ids),
            atol=1e-5,
            rtol=0.0,
        )


def trained_logprobs(
    policy: Policy, sequences: list[list[int]], prompts: list[list[int]]
) -> torch.Tensor:
    """Log-probs of what follows the prompts by training's packed forward."""
    lengths = [len(s) for s in sequences]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.tensor([i for s in sequences for i in s])
    row = PackedRow(borders.to(torch.int32), lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with policy.attention(row):  # type: ignore[attr-defined]
        hidden = policy.hidden(ids, positions, row)
        rows = torch.cat(
            [
                torch.arange(start + len(p) - 1, start + n - 1)
                for start, n, p in zip(borders, lengths, prompts, strict=False)
            ]
        )
        return linear_token_stats(
            hidden[rows],
            policy.weight,
            ids[rows + 1],
            bias=policy.bias,
            softcap=policy.softcap,
            temperature=1 / policy.logit_scale,
        ).logprob


@pytest.mark.parametrize("kind", KINDS)
def test_training_recomputes_the_sampled_logprobs(
    kind: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(kind, spread=0.15)
    params = SamplingParams(max_tokens=NEW, seed=5)
    done = [group[0] for group in Sampler(model).generate(PROMPTS, params)]
    sequences = [p + c.token_ids for p, c in zip(PROMPTS, done, strict=True)]
    trained = trained_logprobs(Policy(model), sequences, PROMPTS)
    sampled = torch.tensor([x for c in done for x in c.logprobs])
    torch.testing.assert_close(trained.detach(), sampled, atol=1e-5, rtol=0.0)

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(trained.sum(), parameters, allow_unused=True)
    own = sum(
        model(input_ids=torch.tensor([s]), use_cache=False)
        .logits[0, len(p) - 1 : -1]
        .log_softmax(-1)
        .gather(1, torch.tensor(s[len(p) :])[:, None])
        .sum()
        for s, p in zip(sequences, PROMPTS, strict=True)
    )
    expected = torch.autograd.grad(own, parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:  # some are 0 but for rounding: the bias of keys
            torch.testing.assert_close(gradient, wanted, atol=1e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("kind", ["deepseek_v3", "diffllama", "gemma3_text", "gpt_oss", "phimoe"])
def test_tokens_survive_preemption(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind, spread=0.15)
    params = SamplingParams(max_tokens=NEW, n=3, seed=3)
    large = Sampler(model, config=SamplerConfig(block_size=4)).generate(PROMPTS, params)
    small = Sampler(model, config=SamplerConfig(block_size=4, num_blocks=13, max_prefill_tokens=6))
    with small.session(PROMPTS, params) as session:
        rows = [
            session.add_group(prompt, params, small.rules_of(params), prompt_id=i, step=0)
            for i, prompt in enumerate(PROMPTS)
        ]
        while session.unfinished:
            session.step()
        got = [[session.row(row).token_ids.tolist() for row in group] for group in rows]
        assert session.scheduler.stats()["preemptions"] > 0
    assert got == [[c.token_ids for c in group] for group in large]


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 512),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
    ],
    ids=["linear", "yarn", "dynamic", "llama3"],
)
def test_scaled_rotary_positions(
    rope: dict[str, Any], positions: int, make_model: Callable[..., Any]
) -> None:
    model = make_model(
        "llama", spread=0.15, rope_parameters=rope, max_position_embeddings=positions
    )
    done = Sampler(model).generate(PROMPTS, SamplingParams(max_tokens=NEW, seed=1))
    for prompt, (completion,) in zip(PROMPTS, done, strict=True):
        expected = own_logprobs(model, prompt, completion.token_ids)
        got = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)


def test_windows_that_only_masks_know_are_found_beyond_the_trial(
    make_model: Callable[..., Any],
) -> None:
    window = 100
    assert paged_model(make_model("phimoe", sliding_window=window)).windows == {
        (0, 0): window,
        (1, 0): window,
    }
    assert paged_model(make_model("mistral")).windows == {}


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("bloom", {}, "ALiBi.*BloomAttention does not go through transformers' attention interf"),
        ("falcon", {}, "ALiBi"),
        ("mamba", {}, "layers of type linear_attention"),
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("rwkv", {}, r"recurrent or state-space layers \(RwkvBlock"),
        ("gptj", {"rotary_dim": 4}, "GPTJAttention does not go through"),
        ("xglm", {"attention_heads": 4, "d_model": 32, "ffn_dim": 48}, "XGLMAttention"),
        ("bert", {}, r"layer 0 \(BertSelfAttention\): it attends in both directions"),
        ("doge", {"keep_window_size": 64}, r"layer 0 \(DogeAttention\): it attends through a mask"),
        ("llama4_text", {"attention_chunk_size": 100}, "chunked attention"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("bart", {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32}, "no position_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_what_cannot_be_paged_is_refused(
    kind: str, changes: dict[str, Any], why: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(kind, spread=0.15, **changes)
    with pytest.raises(ModelError, match=f"(?s)cannot be sampled.*{why}") as refused:
        Sampler(model).generate(PROMPTS, SamplingParams(max_tokens=2))
    assert type(model).__name__ in str(refused.value)


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        Sampler(T5ForConditionalGeneration(config)).generate([[1]], SamplingParams(max_tokens=1))
