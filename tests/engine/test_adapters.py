"""Adapters are sampled as they are trained: unmerged, through the wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from eapo_fast import SamplingParams
from eapo_fast.engine import Completion, Sampler, SamplerConfig
from eapo_fast.engine.support import paged_model
from eapo_fast.errors import ModelError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
PARAMS = SamplingParams(max_tokens=12, n=2, seed=4)


class LowRank(nn.Module):
    """A frozen linear layer plus a trained low-rank one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def generate(model: Any) -> list[list[Completion]]:
    return Sampler(model).generate(PROMPTS, PARAMS)


@torch.no_grad()
def check_logprobs(model: Any, completions: list[list[Completion]]) -> None:
    """Completions have the log-probs of the model's own forward."""
    for prompt, group in zip(PROMPTS, completions, strict=True):
        for done in group:
            ids = torch.tensor([prompt + done.token_ids])
            rows = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = rows.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_low_rank_layers_by_hand(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind, spread=0.15)
    plain = generate(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
        layer.mlp.up_proj = LowRank(layer.mlp.up_proj)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapted = generate(model)
    assert adapted != plain
    check_logprobs(model, adapted)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.up.weight.mul_(2.0)
    check_logprobs(model, generate(model))


@pytest.fixture
def lora(make_model: Callable[..., Any]) -> Any:
    """A `PeftModel` with LoRA on attention, MLP and head, all of it non-zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.5,
        target_modules=["q_proj", "v_proj", "up_proj", "lm_head"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    return peft.get_peft_model(make_model(spread=0.15, tie_word_embeddings=False), config)


def test_peft_models_sample_unmerged(lora: Any) -> None:
    lora.train()
    lora.enable_input_require_grads()
    weights = {name: p.clone() for name, p in lora.named_parameters()}
    adapted = generate(lora)
    assert lora.training
    assert all(torch.equal(p, weights[name]) for name, p in lora.named_parameters())
    assert not any(getattr(module, "merged", False) for module in lora.modules())
    check_logprobs(lora.eval(), adapted)
    with lora.disable_adapter():
        plain = generate(lora)
        check_logprobs(lora, plain)
    assert plain != adapted
    assert generate(lora.get_base_model()) == adapted


def test_switched_peft_adapters_are_followed(lora: Any) -> None:
    peft = pytest.importorskip("peft")
    first = generate(lora)
    other = peft.LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False)
    lora.add_adapter("other", other)
    lora.set_adapter("other")
    second = generate(lora)
    assert second != first
    check_logprobs(lora.eval(), second)
    lora.set_adapter("default")
    assert generate(lora) == first


def test_cached_prefixes_are_those_of_the_active_adapters(lora: Any) -> None:
    sampler = Sampler(lora, config=SamplerConfig(block_size=2))
    adapted = sampler.generate(PROMPTS, PARAMS)
    with lora.disable_adapter():
        plain = sampler.generate(PROMPTS, PARAMS)
        check_logprobs(lora.eval(), plain)
    assert sampler.generate(PROMPTS, PARAMS) == adapted
    for module in lora.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            scaling["default"] *= 0.25
    check_logprobs(lora, sampler.generate(PROMPTS, PARAMS))


def test_a_head_that_is_trained_whole(make_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["k_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(make_model(spread=0.15, tie_word_embeddings=False), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    check_logprobs(model.eval(), generate(model))


def test_virtual_tokens_are_refused(make_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM.*'default' puts virtual tokens"):
        paged_model(peft.get_peft_model(make_model(), config))
