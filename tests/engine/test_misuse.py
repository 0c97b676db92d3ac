"""What nobody planned for: it ends with a clear error, or works, and leaves no mark."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Rules, Sampler, SamplerConfig
from eapo_fast.engine import attention as attention_module
from eapo_fast.errors import ConfigError, ModelError

PROMPTS = [[5, 6, 7], list(range(8, 40)), [40, 41, 42, 43]]
PARAMS = SamplingParams(max_tokens=8, n=2, seed=4)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_an_optimizer_step_forgets_prefixes(
    name: str, fused: bool, make_model: Callable[..., Any]
) -> None:
    model = make_model(spread=0.15)
    sampler = Sampler(model, config=SamplerConfig(block_size=4))
    before = sampler.generate(PROMPTS, PARAMS)
    sampler.drain_counters()
    model(input_ids=torch.tensor([PROMPTS[1]])).logits.square().mean().backward()
    getattr(torch.optim, name)(model.parameters(), lr=0.05, fused=fused).step()
    after = sampler.generate(PROMPTS, PARAMS)
    assert sampler.drain_counters()["prefix_hit_tokens"] == 0
    assert after == Sampler(model).generate(PROMPTS, PARAMS) != before
    sampler.generate(PROMPTS, PARAMS)
    assert sampler.drain_counters()["prefix_hit_tokens"] > 0


def test_a_changed_buffer_forgets_prefixes(make_model: Callable[..., Any]) -> None:
    model = make_model()
    sampler = Sampler(model, config=SamplerConfig(block_size=4))
    sampler.generate(PROMPTS, PARAMS)
    sampler.drain_counters()
    next(model.buffers()).mul_(0.5)
    sampler.generate(PROMPTS, PARAMS)
    assert sampler.drain_counters()["prefix_hit_tokens"] == 0


def test_an_interrupt_anywhere_leaves_no_mark(make_model: Callable[..., Any]) -> None:
    model = make_model().train()
    attention = model.config._attn_implementation
    sampler = Sampler(model)
    expected = sampler.generate(PROMPTS, PARAMS)
    hits = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + turn * 2e-4)
                sampler.generate(PROMPTS, PARAMS)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert model.config._attn_implementation == attention
            assert all(module.training for module in model.modules())
            assert not any("forward" in vars(module) for module in model.modules())
            assert attention_module._current.get() is None
    finally:
        signal.signal(signal.SIGALRM, old)
    assert hits > 10
    assert sampler.generate(PROMPTS, PARAMS) == expected


def test_samplers_of_one_model_take_turns_in_threads(make_model: Callable[..., Any]) -> None:
    model = make_model(spread=0.15).train()
    expected = Sampler(model).generate(PROMPTS, PARAMS)
    ready = threading.Barrier(3)

    def work(_: int) -> list[Any]:
        sampler = Sampler(model)
        ready.wait()
        return [sampler.generate(PROMPTS, PARAMS) for _ in range(4)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[expected] * 4] * 3
    assert all(module.training for module in model.modules())


def test_one_sampler_has_one_session_at_a_time(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    with sampler.session(PROMPTS, PARAMS) as session:
        session.add_group(PROMPTS[0], PARAMS, Rules(), prompt_id=0, step=0)
        session.step()
        with pytest.raises(ConfigError, match="one session at a time"):
            sampler.generate(PROMPTS, PARAMS)
        session.step()
    assert len(sampler.generate(PROMPTS, PARAMS)) == 3


def test_a_probe_in_another_thread_is_no_forward(make_model: Callable[..., Any]) -> None:
    from eapo_fast.engine.attention import attention_as
    from eapo_fast.engine.probe import NAME

    model = make_model()
    with attention_as(model, NAME), pytest.raises(ModelError, match="tries it out"):
        model(input_ids=torch.tensor([PROMPTS[0]]))


def test_a_pool_too_small_for_the_replies_is_named(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model(), config=SamplerConfig(block_size=4, num_blocks=12))
    with sampler.session([[1, 2, 3]], PARAMS, foreign_tokens=30):
        pass
    with (
        pytest.raises(ConfigError, match=r"num_blocks: got 12 .* up to 40 injected ones .* 51 tok"),
        sampler.session([[1, 2, 3]], PARAMS, foreign_tokens=40),
    ):
        pass


def test_a_pool_beyond_memory_is_refused_at_once(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model(), config=SamplerConfig(num_blocks=2_000_000_000))
    with pytest.raises(ConfigError, match="num_blocks: got 2000000000 blocks, which take"):
        sampler.generate(PROMPTS, PARAMS)


def test_eos_is_what_generation_config_says_now(make_model: Callable[..., Any]) -> None:
    model = make_model()
    sampler = Sampler(model)
    model.generation_config.eos_token_id = [3, 9]
    assert sampler.eos_token_ids == (3, 9)
    model.generation_config.eos_token_id = -1
    assert sampler.eos_token_ids == ()
    model.generation_config.eos_token_id = None  # generate goes on too, whatever config says
    assert sampler.eos_token_ids == ()
    (done,) = sampler.generate(PROMPTS[:1], SamplingParams(max_tokens=30))
    assert len(done[0].token_ids) == 30


def test_params_in_the_documented_order() -> None:
    params = SamplingParams(4, 0.7, 50, 0.9, 0.1, 2, 11, ("a",), (1,))
    assert (params.top_k, params.top_p, params.min_p, params.n, params.seed) == (
        50,
        0.9,
        0.1,
        2,
        11,
    )
    assert (params.stop, params.stop_token_ids) == (("a",), (1,))
    assert hash(SamplingParams(4, stop=["a"])) == hash(SamplingParams(4, stop=("a",)))


def test_strings_may_be_alone_repeated_or_in_several_lists(
    make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    sampler = Sampler(make_model(), bpe_tokenizer)
    params = SamplingParams(40, stop="xyz", banned_strings=("qq", "qq"))
    assert params.stop == ("xyz",)
    assert params.banned_strings == ("qq",)
    (done,) = sampler.generate(PROMPTS[:1], params)
    text = sampler.vocabulary.text(done[0].token_ids)  # type: ignore[union-attr]
    assert "xyz" not in text[:-3]
    letter = text[0]
    both = SamplingParams(40, stop=(letter, letter), banned_strings=(letter,))
    (done,) = sampler.generate(PROMPTS[:1], both)
    assert letter not in sampler.vocabulary.text(done[0].token_ids)  # type: ignore[union-attr]
    with sampler.session(PROMPTS[:1], params) as session:
        rules = Rules(stop=("</c>",), park=("</c>", "</d>", "</d>"), banned_strings=("</d>",))
        session.add_group(PROMPTS[0], params, rules, prompt_id=0, step=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": ("",)}, "stop: got '', allowed are strings that are not empty"),
        ({"banned_strings": [3]}, "banned_strings: got 3"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5, allowed are token ids"),
        ({"banned_token_ids": [1.5]}, "banned_token_ids: got"),
        ({"max_tokens": 1 << 31}, "max_tokens: got 2147483648, allowed is 1 to 2147483647"),
        ({"n": 2.0}, "n: got 2.0, allowed is 1 to"),
        ({"n": True}, "n: got True"),
        ({"top_k": None}, "top_k: got None"),
        ({"temperature": None}, "temperature: got None"),
        ({"temperature": 1e39}, "temperature: got 1e"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 1e-50}, "top_p: got 1e-50"),
        ({"seed": None}, "seed: got None, allowed is an integer from 0"),
        ({"seed": 1 << 70}, "seed: got 11805"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_values_that_no_kernel_takes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        SamplingParams(**({"max_tokens": 4} | settings))


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([5, 6, 7], {}, "prompt 0: got 5, want a list of token ids"),
        (["text"], {}, "prompt 0: got 'text', want a list of token ids"),
        ([[1.5]], {}, "prompt 0: got"),
        ([[1], [2]], {"prompt_ids": [3]}, "prompt_ids: got 1 for 2 prompts"),
        ([[1]], {"prompt_ids": ["a"]}, "prompt_ids: got"),
        ([[1]], {"params": None}, None),
        ([[1]], {"params": [PARAMS, PARAMS]}, "params: got 2 for 1 prompts"),
        ([[1]], {"params": ["x"]}, "params: got 'x', allowed is SamplingParams"),
    ],
)
def test_requests_of_another_kind(
    prompts: Any, changes: dict[str, Any], message: str | None, make_model: Callable[..., Any]
) -> None:
    arguments = {"params": PARAMS} | changes
    with pytest.raises(ConfigError, match=message):
        Sampler(make_model()).generate(prompts, **arguments)


def test_arrays_are_prompts_too(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    expected = sampler.generate(PROMPTS, PARAMS)
    arrays: Any = [np.array(PROMPTS[0]), torch.tensor(PROMPTS[1]), tuple(PROMPTS[2])]
    assert sampler.generate(arrays, PARAMS) == expected
    assert sampler.generate(iter(arrays), PARAMS, prompt_ids=range(3)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_float64_models(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind, spread=0.15).double()
    (done,) = Sampler(model).generate(PROMPTS[:1], SamplingParams(12))
    ids = torch.tensor([PROMPTS[0] + done[0].token_ids])
    with torch.no_grad():
        rows = model(input_ids=ids, use_cache=False).logits[0, 2:-1].log_softmax(-1)
    expected = rows.gather(1, ids[0, 3:, None])[:, 0]
    got = torch.tensor(done[0].logprobs, dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)


def test_compiled_and_inference_models(make_model: Callable[..., Any]) -> None:
    expected = Sampler(make_model()).generate(PROMPTS, PARAMS)
    compiled = torch.compile(make_model(), backend="eager")
    assert Sampler(compiled).generate(PROMPTS, PARAMS) == expected  # type: ignore[arg-type]
    with torch.inference_mode():
        model = make_model()
    assert Sampler(model).generate(PROMPTS, PARAMS) == expected
