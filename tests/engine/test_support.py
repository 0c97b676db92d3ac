"""The trial: what it notices, when it runs again, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler
from eapo_fast.engine.support import TOLERANCE, paged_model
from eapo_fast.errors import ModelError


def count_forwards(model: nn.Module) -> list[int]:
    """A list that gets an entry with every forward of `model`."""
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    return forwards


def test_the_trial_measures_and_sums_up(make_model: Callable[..., Any]) -> None:
    found = paged_model(make_model("deepseek_v3"))
    assert found.difference is not None
    assert found.difference < 1e-5
    assert found.kv_elements == 2 * 2 * 4 * 12  # layers, keys and values, heads, width of keys


def test_values_may_be_wider_than_keys(make_model: Callable[..., Any]) -> None:
    found = paged_model(make_model("deepseek_v3", spread=0.15, v_head_dim=20))
    assert found.kv_elements == 2 * 2 * 4 * 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_pass_with_room(dtype: torch.dtype, make_model: Callable[..., Any]) -> None:
    found = paged_model(make_model("qwen3", spread=0.15).to(dtype))
    assert found.difference is not None
    assert found.difference < TOLERANCE[dtype] / 4


def test_one_trial_per_model_configuration_and_dtype(make_model: Callable[..., Any]) -> None:
    model = make_model()
    forwards = count_forwards(model)

    def trial() -> bool:
        before = len(forwards)
        paged_model(model)
        return len(forwards) > before

    assert trial()
    assert not trial()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert not trial()
    model.config.rms_norm_eps = 1e-4
    assert trial()
    model.to(torch.bfloat16)
    assert trial()
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    assert trial()
    assert not trial()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_trial_leaves_all_as_it_was(make_model: Callable[..., Any]) -> None:
    model = make_model("gemma2").train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    flags = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    config = model.config.to_dict()
    implementation = model.config._attn_implementation
    functions, masks = dict(AttentionInterface._global_mapping), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    random = torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    paged_model(model)
    assert [module.training for module in model.modules()] == modes
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == flags
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert AttentionInterface._global_mapping == functions
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == masks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None
        for a, b in zip(weights, model.parameters(), strict=True)
    )


class OwnAttention(nn.Module):
    """Attention that computes softmax(q k') v itself, as remote code may."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.inner.head_dim)
        q, k, v = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.inner.q_proj, self.inner.k_proj, self.inner.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.inner.o_proj(out.transpose(1, 2).flatten(2)), None


def test_attention_outside_of_the_interface_is_measured(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")  # near-uniform initialisation: attention hardly weighs in
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)
    with pytest.raises(ModelError) as refused:
        Sampler(model).generate([[1, 2]], SamplingParams(max_tokens=1))
    message = str(refused.value)
    assert "model: LlamaForCausalLM cannot be sampled on paged attention: logits" in message
    assert "of their spread; allowed is 0.001 in torch.float32" in message
    assert "Likely: OwnAttention does not go through" in message


def test_a_window_that_contradicts_the_mask_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("gemma2", sliding_window=100)
    model.model.layers[0].self_attn.sliding_window = 50
    with pytest.raises(ModelError, match=r"layer 0 .*told a sliding window of 50, its mask h"):
        paged_model(model)


NAME = "model.layers.0.mlp.up_proj.weight"


def test_weights_that_are_elsewhere_are_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(ModelError, match=f"1 of its parameters are on the meta device.*{NAME}"):
        paged_model(model)


@pytest.mark.parametrize("mark", ["ds_shape", "_is_flat_param", "device_mesh"])
def test_shards_are_refused(mark: str, make_model: Callable[..., Any]) -> None:
    """ZeRO-3 outside of a gathering context, FSDP, FSDP2 and tensor parallel, by their marks."""
    model = make_model()
    layer = model.model.layers[0].mlp.up_proj
    if mark == "ds_shape":
        layer.weight = nn.Parameter(torch.empty(0))
    setattr(layer.weight, mark, (48, 32))
    with pytest.raises(ModelError, match=f"1 of its parameters are shards.*{NAME}"):
        paged_model(model)


def test_wrappers_are_refused(make_model: Callable[..., Any]) -> None:
    wrapper: Any = nn.DataParallel(make_model())
    with pytest.raises(ModelError, match=r"DataParallel.*not a transformers model.*\.module"):
        paged_model(wrapper)
    with pytest.raises(ModelError, match="DataParallel has no LM head"):
        Sampler(wrapper)


def test_logits_that_are_not_finite_are_no_reason_to_refuse(make_model: Callable[..., Any]) -> None:
    model = make_model()
    forwards = count_forwards(model)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.fill_(float("nan"))
    assert paged_model(model).difference is None
    with torch.no_grad():
        weight.fill_(1.0)
    before = len(forwards)
    assert paged_model(model).difference is not None
    assert len(forwards) > before
