"""Fused modules of transformers models on a GPU backend, and the sampler on top of them.

Without a GPU the interpreter runs them on the CPU's tensors, and the sampler's other ops too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eapo_fast import Sampler, SamplerConfig, SamplingParams
from eapo_fast.engine import fused, fused_forwards
from eapo_fast.engine.fused import fused_modules, units_of
from eapo_fast.engine.fused_forwards import FusedNorm
from eapo_fast.engine.fused_target import Target
from eapo_fast.errors import ModelError
from eapo_fast.kernels import kv_write, paged_attention, sample
from eapo_fast.kernels.native import GPU_STORAGE

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PRE = {"RMSNorm": 5, "MLP": 2, "Attention": 2, "DecoderLayer": 2}
KINDS: dict[str, tuple[dict[str, Any], dict[str, int], tuple[int, int]]] = {
    "llama": ({}, PRE, (1, 4)),
    "qwen2": ({}, PRE, (1, 4)),
    "qwen3": ({}, PRE | {"RMSNorm": 9}, (5, 4)),
    "qwen3_moe": (MOE, {"RMSNorm": 9, "Attention": 2, "DecoderLayer": 2}, (5, 4)),
    "mistral": ({"sliding_window": 7}, PRE, (1, 4)),
    "phi3": ({"partial_rotary_factor": 0.5}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}, (5, 0)),
    "granite": ({}, {"RMSNorm": 5, "MLP": 2, "Attention": 2}, (5, 0)),
    "olmo2": ({}, {"RMSNorm": 9, "MLP": 2, "Attention": 2}, (9, 0)),
    "gemma2": ({}, PRE | {"RMSNorm": 9}, (5, 4)),
    "gemma3_text": ({}, PRE | {"RMSNorm": 13}, (9, 4)),
}
"""Settings; modules that are fused; norms of a forward alone and with the sum before them."""

DTYPES = (torch.float32, torch.bfloat16)
IDS = torch.arange(5, 9).view(2, 2)
MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device) -> None:
    """Without a GPU have the interpreter take the CPU's place."""
    assert backend == "triton"
    if device.type == "cpu":
        target = Target(device, "triton", GPU_STORAGE)
        monkeypatch.setattr(fused, "target_of", lambda _: target)
        for op in (kv_write, paged_attention, sample):
            monkeypatch.setattr(op, "cpu_refusal", lambda _: "Triton is checked")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the fused norms."""
    counted: Counter[str] = Counter()

    def counting(op: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counted[op.__name__] += 1
            return op(*args, **kwargs)

        return count

    for op in (fused_forwards.rms_norm, fused_forwards.add_rms_norm):
        monkeypatch.setattr(fused_forwards, op.__name__, counting(op))
    return counted


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS.to(model.device), use_cache=False).logits
    return out


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in vars(m)]


def random_norms(model: nn.Module) -> None:
    """Give norm weights values that are worth multiplying by."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.8, 0.3)


def role(module: nn.Module) -> str:
    name = type(module).__name__
    return next(role for role in PRE if name.endswith(role))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(
    kind: str, make_model: MakeModel, device: torch.device, counts: Counter[str]
) -> None:
    """To rounding, with as few launches of norms as there can be, and nothing stays behind."""
    changes, wanted, (alone, with_sum) = KINDS[kind]
    for dtype in DTYPES if kind in ("qwen2", "phi3", "gemma3_text") else DTYPES[:1]:
        model = make_model(kind, **changes)
        random_norms(model)
        model.to(device, dtype)
        before = logits(model)
        with fused_modules(model):
            assert Counter(map(role, replaced(model))) == wanted
            counts.clear()
            got = logits(model)
            assert (counts["rms_norm"], counts["add_rms_norm"]) == (alone, with_sum)
            assert all(u.fused._ready is None for u in norms(model))  # all were asked for
        assert replaced(model) == []
        scale = float(before.abs().max())
        tolerance = 5e-6 if dtype == torch.float32 else 2**-6  # rounding of two layers
        torch.testing.assert_close(got, before, rtol=0, atol=tolerance * scale)


def norms(model: nn.Module) -> list[Any]:
    return [unit for unit in units_of(model) if isinstance(unit.fused, FusedNorm)]


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_float16(kind: str, make_model: MakeModel, device: torch.device) -> None:
    model = make_model(kind).to(device, torch.float16)
    before = logits(model)
    with fused_modules(model):
        assert len(replaced(model)) > 10
        got = logits(model)
    torch.testing.assert_close(got, before, rtol=0, atol=2**-9 * float(before.abs().max()))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "gemma3_text"])
def test_the_sampler_on_all_of_it(
    kind: str, make_model: MakeModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens are those of `generate`, log-probabilities those of an ordinary forward.

    All layers of all steps but the first turn queries and keys in the launch that writes the cache.
    """
    turned: list[int] = []
    op = paged_attention.rotary_kv_write

    def count(*args: Any, **kwargs: Any) -> Tensor:
        turned.append(len(args[0]))
        return op(*args, **kwargs)

    monkeypatch.setattr(paged_attention, "rotary_kv_write", count)
    model = make_model(kind, spread=0.15).to(device)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 40, 41]]
    config = SamplerConfig(block_size=4, max_prefill_tokens=6)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    rows = Sampler(model, config=config).generate(prompts, params)
    assert len(turned) >= 2 * 5
    assert len(turned) % 2 == 0
    for prompt, (row,) in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt], device=device)
        want = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert row.token_ids == want[0, len(prompt) :].tolist()
        with torch.no_grad():
            scores = model(want, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scores.gather(1, want[0, len(prompt) :, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=2e-5)


def test_autocast(
    make_model: MakeModel,
    device: torch.device,
    counts: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A float32 model under autocast: sums of two dtypes, and rotations that autocast rounds."""
    turned: list[torch.dtype] = []
    op = paged_attention.rotary_kv_write

    def count(*args: Any, **kwargs: Any) -> Tensor:
        turned.append(args[0].dtype)
        return op(*args, **kwargs)

    monkeypatch.setattr(paged_attention, "rotary_kv_write", count)
    model = make_model(spread=0.15).to(device)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    rows = []
    with torch.autocast(device.type, torch.bfloat16):
        units_of(model)  # whose trials count too
    counts.clear()
    for use in (True, False):
        sampler = Sampler(model, config=SamplerConfig(block_size=4, fused_modules=use))
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(sampler.generate([[5, 6, 7]], params)[0][0])
        assert len(turned) == 4 * 2
    assert set(turned) == {torch.bfloat16}
    assert counts["add_rms_norm"] == 5 * 4
    assert rows[0].token_ids == rows[1].token_ids
    ours, plain = (torch.tensor(row.logprobs) for row in rows)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-3)


def test_weights_may_change_in_place(make_model: MakeModel, device: torch.device) -> None:
    model = make_model().to(device)
    with fused_modules(model):
        before = logits(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        got = logits(model)
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-5)


def test_hooks_and_changes_in_between_count(make_model: MakeModel, device: torch.device) -> None:
    """Whoever looks at a layer's or a norm's tensors, or changes them, is heard as ever."""
    model = make_model().to(device)
    first, second = model.model.layers
    heard: Counter[str] = Counter()
    for name in ("input_layernorm", "post_attention_layernorm", "mlp", "self_attn", "mlp.act_fn"):
        first.get_submodule(name).register_forward_hook(lambda *_, n=name: heard.update([n]))
    changes: list[Callable[[], Any]] = [
        lambda: first.register_forward_hook(lambda m, a, out: out + 1.0),
        lambda: first.register_forward_hook(lambda m, a, out: out.mul_(1.5)),
        lambda: second.input_layernorm.register_forward_pre_hook(lambda m, a: (a[0] * 2.0,)),
        lambda: second.post_attention_layernorm.register_forward_hook(lambda m, a, out: out * 3),
        lambda: model.model.norm.register_forward_pre_hook(lambda m, a: (a[0].add_(1.0),)),
    ]
    plain = logits(model)
    for change in changes:
        handle = change()
        want = logits(model)
        assert not torch.allclose(want, plain)
        heard.clear()
        with fused_modules(model):
            got = logits(model)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert set(heard.values()) == {1}
        assert len(heard) == 5
        handle.remove()


def test_adapters_run_inside_fused_layers(make_model: MakeModel, device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    model = make_model(spread=0.15).to(device)
    plain = logits(model)
    adapted = peft.get_peft_model(model, config)
    with fused_modules(adapted):
        assert len(replaced(adapted)) == sum(PRE.values())
        got = logits(adapted)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted), plain, rtol=0, atol=2e-5)
    assert not torch.allclose(got, plain, atol=1e-3)
    torch.testing.assert_close(got, logits(adapted), rtol=0, atol=2e-5)


def test_gradients_take_the_own_forward(make_model: MakeModel, device: torch.device) -> None:
    model = make_model().to(device)

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=IDS.to(device), use_cache=False).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    before = gradient()
    with fused_modules(model):
        torch.testing.assert_close(gradient(), before, rtol=1e-5, atol=1e-7)


def test_layers_of_another_make_are_left_alone(
    make_model: MakeModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer class that adds otherwise, and a layer with a part more."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = make_model("llama").to(device)
    model.model.layers[0].extra = nn.Identity()
    with fused_modules(model):
        fused_ones = set(replaced(model))
        assert [layer in fused_ones for layer in model.model.layers] == [False, True]
    own = LlamaDecoderLayer.forward
    other = make_model("llama", seed=1).to(device)
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs) * 2.0
    )
    before = logits(other)
    with fused_modules(other):
        assert not set(other.model.layers) & set(replaced(other))
        torch.testing.assert_close(logits(other), before, rtol=0, atol=1e-5)


def test_what_does_not_reach_attention_is_an_error(
    make_model: MakeModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that changes its habits after paged attention relied on them."""
    model = make_model().to(device)
    sampler = Sampler(model, config=SamplerConfig(block_size=4))
    params = SamplingParams(max_tokens=2, temperature=0.0)
    with fused_modules(model):
        expected = sampler.generate([[5, 6, 7]], params)
        attention = model.model.layers[1].self_attn
        forward = vars(attention)["forward"]

        def negated(*args: Any, **kwargs: Any) -> Any:
            scope = forward.__globals__
            turn = scope["apply_rotary_pos_emb"]
            scope["apply_rotary_pos_emb"] = lambda *given: tuple(-x for x in turn(*given))
            try:
                return forward(*args, **kwargs)
            finally:
                scope["apply_rotary_pos_emb"] = turn

        vars(attention)["forward"] = negated
        with pytest.raises(ModelError, match="Qwen2Attention used to attend"):
            sampler.generate([[5, 6, 7]], params)
        # Now it is known not to hand them on; both are negated, so scores are as they were.
        assert Sampler(model).generate([[5, 6, 7]], params) == expected
        vars(attention)["forward"] = forward
        assert sampler.generate([[5, 6, 7]], params) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares devices")
def test_a_model_that_moves(make_model: MakeModel, device: torch.device) -> None:
    model = make_model()
    with fused_modules(model):
        on_cpu = logits(model)
    model.to(device)
    with fused_modules(model):
        assert len(replaced(model)) == sum(PRE.values())
        torch.testing.assert_close(logits(model).cpu(), on_cpu, rtol=0, atol=1e-4)
