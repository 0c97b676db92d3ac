"""Weights that are cast once a sampling call give the bits of autocast, which casts them itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from eapo_fast.engine import Sampler, SamplerConfig, SamplingParams, casts

PROMPTS = [[3, 4, 5], [3, 4, 5, 6, 7, 8, 9]]
PARAMS = SamplingParams(max_tokens=12, n=3, seed=1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cast weights on a CPU too, where autocast keeps its casts by itself."""
    monkeypatch.setattr(casts, "_wanted", lambda model: torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def sampled(model: Any, **config: Any) -> list[Any]:
    return Sampler(model, config=SamplerConfig(**config)).generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi"])
def test_the_bits_of_autocast(
    kind: str, fused: bool, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, spread=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = sampled(model, fused_modules=fused)
        monkeypatch.setattr(casts, "_wanted", lambda model: torch.bfloat16)
        used = []
        call = casts.CastLinear.__call__
        monkeypatch.setattr(
            casts.CastLinear, "__call__", lambda self, x: used.append(1) or call(self, x)
        )
        assert sampled(model, fused_modules=fused) == want
    assert used
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_update_is_seen(make_model: Callable[..., Any], on_cpu: None) -> None:
    model = make_model(spread=0.15)
    sampler = Sampler(model)
    sampler.generate(PROMPTS, PARAMS)
    own = casts._casts[model]
    places = [x.data_ptr() for cast in own.values() for x in cast.copies]
    assert places
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    got = sampler.generate(PROMPTS, PARAMS)
    fresh = make_model(spread=0.15)
    fresh.load_state_dict(model.state_dict())
    assert got == sampled(fresh)
    kept = [x.data_ptr() for cast in casts._casts[model].values() for x in cast.copies]
    assert kept == places, "captured forwards read them where they lie"


def test_products_of_one_input_share_its_cast(make_model: Callable[..., Any], on_cpu: None) -> None:
    model = make_model(spread=0.15)
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 32)
    with torch.no_grad(), casts.cast_weights(model):
        inputs = vars(attention.q_proj)["forward"].inputs
        assert inputs is vars(model.lm_head)["forward"].inputs
        want = attention.k_proj(x.clone())
        attention.q_proj(x)
        first = inputs.cast(x, torch.bfloat16)
        assert torch.equal(attention.k_proj(x), want)
        assert inputs.cast(x, torch.bfloat16) is first
        x.mul_(2.0)  # exact in bfloat16
        assert torch.equal(inputs.cast(x, torch.bfloat16), 2 * first)
        other = x.bfloat16()
        assert inputs.cast(other, torch.bfloat16) is other
        assert inputs.cast(x.double(), torch.bfloat16).dtype == torch.float64
        assert inputs.cast(x, torch.float16).dtype == torch.float16
    assert inputs._last is None


def test_a_module_left_out_once_keeps_its_copy(
    make_model: Callable[..., Any], on_cpu: None
) -> None:
    model = make_model()
    layer = model.model.layers[0].mlp.up_proj

    def place() -> int:
        with casts.cast_weights(model):
            pass
        return int(casts._casts[model][layer, torch.bfloat16].copies[0].data_ptr())

    first = place()
    vars(layer)["forward"] = type(layer).forward.__get__(layer)  # somebody's own
    assert place() == first
    del vars(layer)["forward"]
    assert place() == first
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with casts.cast_weights(model):
        assert (layer, torch.bfloat16) not in casts._casts[model]


def test_gradients_take_the_weights_themselves(
    make_model: Callable[..., Any], on_cpu: None
) -> None:
    model = make_model(spread=0.15)
    ids = torch.tensor([[3, 4, 5, 6]])
    want = model(input_ids=ids).logits
    with casts.cast_weights(model), casts.cast_weights(model):
        assert any("forward" in vars(module) for module in model.modules())
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, want)
        logits.sum().backward()
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            plain = model(input_ids=ids).logits
    assert model.lm_head.weight.grad is not None
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        assert torch.equal(plain, model(input_ids=ids).logits)


def test_what_is_left_alone(make_model: Callable[..., Any], on_cpu: None) -> None:
    """Modules of other classes, other dtypes, and those whose forward somebody has replaced."""

    class Own(nn.Linear):
        pass

    model = make_model()
    layer = model.model.layers[0].mlp
    layer.up_proj = Own(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    layer.gate_proj.bfloat16()
    layer.down_proj.forward = lambda x: x
    with casts.cast_weights(model):
        taken = {m for m in model.modules() if isinstance(vars(m).get("forward"), casts.CastLinear)}
    assert model.lm_head in taken
    assert not taken & {layer.up_proj, layer.gate_proj, layer.down_proj}


def test_only_where_it_helps(make_model: Callable[..., Any]) -> None:
    model = make_model()
    assert casts._wanted(model) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert casts._wanted(model) is None
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=False):
        assert casts._wanted(model) is None


def test_copies_go_with_their_model(make_model: Callable[..., Any], on_cpu: None) -> None:
    model = make_model()
    with casts.cast_weights(model):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
