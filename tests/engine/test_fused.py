"""Fused modules against the model's own forward, and what they leave behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUTanh
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler
from eapo_fast.engine.fused import fused_modules, units_of

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}),
    "qwen2": ({}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}),
    "qwen3": ({}, {"RMSNorm": 9, "MLP": 2, "Attention": 2}),
    "qwen3_moe": (MOE, {"RMSNorm": 9, "Attention": 2}),
    "mistral": ({"sliding_window": 7}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}),
    "phi3": ({"partial_rotary_factor": 0.5}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}),
    "granite": ({}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}),
    "olmo2": ({}, {"RMSNorm": 9, "MLP": 2, "Attention": 2}),
    "gemma2": ({}, {"RMSNorm": 9, "MLP": 2, "Attention": 2}),
    "gemma3_text": ({}, {"RMSNorm": 13, "MLP": 2, "Attention": 2}),
}
IDS = torch.arange(5, 45).view(2, 20)
MakeModel = Callable[..., Any]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in vars(m)]


def random_norms(model: nn.Module) -> None:
    """Give norm weights values that are worth multiplying by."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.8, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(
    kind: str, dtype: torch.dtype, make_model: MakeModel
) -> None:
    changes, wanted = KINDS[kind]
    model = make_model(kind, **changes)
    random_norms(model)
    model.to(dtype)
    before = logits(model)
    with fused_modules(model):
        assert Counter(_role(m) for m in replaced(model)) == wanted
        got = logits(model)
    assert replaced(model) == []
    assert torch.equal(logits(model), before)
    scale = float(before.abs().max())
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7  # rounding of two layers
    torch.testing.assert_close(got, before, rtol=0, atol=tolerance * scale)


def _role(module: nn.Module) -> str:
    name = type(module).__name__
    return next(role for role in ("RMSNorm", "MLP", "Attention") if name.endswith(role))


@pytest.mark.parametrize("kind", KINDS)
def test_each_module_rounds_like_its_own_forward(kind: str, make_model: MakeModel) -> None:
    """In bfloat16 norms and MLPs give the same bits, rare last places aside."""
    changes, _ = KINDS[kind]
    model = make_model(kind, **changes).bfloat16()
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        unit.module.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
        for unit in units_of(model)
        if _role(unit.module) != "Attention"
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    with fused_modules(model), torch.no_grad():
        for module, x, want in calls:
            off = (module(x).view(torch.int16).int() - want.view(torch.int16).int()).abs()
            assert off.max() <= 1
            assert (off > 0).double().mean() < 0.002


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3"])
def test_the_sampler_draws_the_same_tokens(kind: str, make_model: MakeModel) -> None:
    sampler = Sampler(make_model(kind))
    params = SamplingParams(max_tokens=12, n=3, seed=4)
    want = sampler.generate(IDS.tolist(), params)
    with fused_modules(sampler.model):
        got = sampler.generate(IDS.tolist(), params)
    assert [[c.token_ids for c in g] for g in got] == [[c.token_ids for c in g] for g in want]


def test_other_models_run_unchanged(make_model: MakeModel) -> None:
    gpt2 = make_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    before = logits(gpt2)
    with fused_modules(gpt2):
        assert replaced(gpt2) == []
        assert torch.equal(logits(gpt2), before)


def test_another_model_of_the_class_is_not_affected(make_model: MakeModel) -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    forward = LlamaRMSNorm.forward
    with fused_modules(model):
        assert replaced(other) == []
        assert LlamaRMSNorm.forward is forward


def test_nests_and_survives_exceptions(make_model: MakeModel) -> None:
    model = make_model()

    def fail_inside() -> None:
        with fused_modules(model):
            with fused_modules(model):
                assert len(replaced(model)) == 9
            assert len(replaced(model)) == 9
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert replaced(model) == []


def test_gradients_take_the_own_forward(make_model: MakeModel) -> None:
    model = make_model()

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    before = gradient()
    with fused_modules(model):
        assert torch.equal(gradient(), before)


def test_float16_and_float64_take_the_own_forward(make_model: MakeModel) -> None:
    for dtype in (torch.float64, torch.float16):
        model = make_model().to(dtype)
        before = logits(model)
        with fused_modules(model):
            assert torch.equal(logits(model), before)


def test_hooks_run(make_model: MakeModel) -> None:
    model = make_model()
    layer = model.model.layers[0]
    heard: Counter[str] = Counter()
    for name in ("input_layernorm", "mlp", "mlp.gate_proj", "mlp.act_fn", "self_attn"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.update([name]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda *_: heard.update(["pre"]))
    with fused_modules(model):
        assert "forward" not in vars(layer.mlp)  # its activation is listened to
        assert "forward" in vars(model.model.layers[1].mlp)
        logits(model)
    assert set(heard.values()) == {1}
    assert len(heard) == 6


def test_lora_layers_run_inside_fused_mlps(make_model: MakeModel) -> None:
    """A wrapper around a projection, put there after the model was first seen."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.delta = nn.Parameter(torch.randn_like(base.weight) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + nn.functional.linear(x, self.delta)  # type: ignore[no-any-return]

    model = make_model()
    plain = logits(model)
    with fused_modules(model):
        pass
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    before = logits(model)
    assert not torch.allclose(before, plain)
    with fused_modules(model):
        assert len(replaced(model)) == 9
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_unfamiliar_structure_is_left_alone(make_model: MakeModel) -> None:
    model = make_model("llama", num_hidden_layers=5)
    layers = model.model.layers
    layers[0].mlp.act_fn = GELUTanh(use_gelu_tanh_python=True)
    layers[1].mlp.act_fn = ACT2FN["relu"]
    layers[2].mlp.extra = nn.Identity()
    layers[3].mlp.forward = layers[3].mlp.forward  # somebody else's wrapper
    layers[0].input_layernorm.variance_epsilon = torch.tensor(1e-6)

    class Similar(LlamaRMSNorm):
        pass

    layers[1].input_layernorm = Similar(32)
    before = logits(model)
    with fused_modules(model):
        fused = set(replaced(model)) - {layers[3].mlp}
        assert [layer.mlp in fused for layer in layers] == [False] * 4 + [True]
        assert [layer.input_layernorm in fused for layer in layers] == [False] * 2 + [True] * 3
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    assert replaced(model) == [layers[3].mlp]


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "new"])
def test_class_with_another_forward_is_left_alone(
    seen: bool, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class whose forward was replaced, as kernel packages do, keeps that forward."""
    model = make_model("llama")
    if seen:
        units_of(model)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    before = logits(model)
    with fused_modules(model):
        assert {_role(m) for m in replaced(model)} == {"Attention"}
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_random_state_is_untouched_and_models_are_not_kept_alive(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    state = torch.get_rng_state()
    with fused_modules(model):
        logits(model)
    assert torch.equal(torch.get_rng_state(), state)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
