"""What a sampling call leaves behind: nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler, SamplerConfig
from eapo_fast.engine.attention import NAME, PagedStep, paged_forward
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.mode import sampling_mode
from eapo_fast.errors import ModelError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
PARAMS = SamplingParams(max_tokens=6, n=2, seed=1)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])


def gradients(model: Any) -> list[torch.Tensor]:
    """Gradients of a training step of the model's own, on fixed tokens and dropout draws."""
    torch.manual_seed(0)
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def state(model: Any) -> tuple[object, ...]:
    """All that training relies on, except the weights."""
    return (
        [(module.training, len(module._forward_hooks)) for module in model.modules()],
        [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.config.to_dict(),
        model.config._attn_implementation,
        dict(ALL_MASK_ATTENTION_FUNCTIONS),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager"), ("gpt2", "sdpa")],
)
def test_training_goes_on_as_before(
    kind: str, attention: str, make_model: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model(kind, attention_dropout=0.1).train()
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_enable()
    next(iter(model.parameters())).requires_grad_(False)
    list(model.modules())[-1].eval()
    expected = gradients(model)
    before = state(model)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(model, config=SamplerConfig(block_size=4)).generate(PROMPTS, PARAMS)
    assert state(model) == before
    assert "use_cache" not in capfd.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model), strict=True))


def test_an_exception_in_mid_step_leaves_training_as_it_was(
    make_model: Callable[..., Any],
) -> None:
    model = make_model().train()
    sampler = Sampler(model)
    sampler.generate(PROMPTS, PARAMS)
    expected = gradients(model)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the third step")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the third step"):
        sampler.generate(PROMPTS, PARAMS)
    assert state(model) == before
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model), strict=True))
    sampler.generate(PROMPTS, PARAMS)


def test_modules_keep_their_own_mode_and_run_no_train_of_their_own() -> None:
    class Merges(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Merges:
            self.merged = not mode
            return super().train(mode)

    model: Any = nn.Sequential(Merges(2, 2), nn.Dropout(), nn.Dropout())
    model.device = torch.device("cpu")
    model[2].eval()
    with sampling_mode(model):
        assert not any(module.training for module in model.modules())
        assert not model[0].merged
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_paged_attention_needs_a_step(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.config._attn_implementation = NAME
    with pytest.raises(ModelError, match="run by another thread while it is sampled"):
        model(input_ids=IDS)


def test_another_thread_does_not_see_the_step(make_model: Callable[..., Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model()
    none = torch.zeros(0, dtype=torch.int32)
    step = PagedStep(PagedCache(2, 4), none.long(), none, none, none.view(0, 0))
    with (
        paged_forward(model, step),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ModelError, match="run by another thread while it is sampled"),
    ):
        pool.submit(model, input_ids=IDS).result()


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_autocast_samples_in_its_dtype(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind, spread=0.15)
    sampler = Sampler(model)
    (plain,) = sampler.generate(PROMPTS[:1], PARAMS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (done,) = sampler.generate(PROMPTS[:1], PARAMS)
        ids = torch.tensor([PROMPTS[0] + done[0].token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, 2:-1].float()
    expected = logits.log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done[0].logprobs), expected, atol=0.1, rtol=0.0)
    assert sampler.generate(PROMPTS[:1], PARAMS)[0] == plain


def test_inference_mode_does_not_outlive_its_call(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model().half(), config=SamplerConfig(block_size=4, num_blocks=40))
    with torch.inference_mode():
        inside = sampler.generate(PROMPTS, PARAMS)
    assert sampler.generate(PROMPTS, PARAMS) == inside


def test_autocast_does_not_sample_from_weights_it_cast_before_an_update(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(spread=0.15)
    sampler = Sampler(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        (stale,) = sampler.generate(PROMPTS[:1], PARAMS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (fresh,) = sampler.generate(PROMPTS[:1], PARAMS)
    assert stale == fresh
