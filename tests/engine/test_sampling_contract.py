"""What a caller of the sampler may rely on: keys, distributions, prefill counts, bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Rules, Sampler, SamplerConfig
from eapo_fast.errors import ConfigError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [40, 41, 42, 43]]


@torch.no_grad()
def next_logits(model: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [N, V] float64 that each of `token_ids` was drawn from, by the ordinary forward."""
    ids = torch.tensor([[*prompt, *token_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()


def run(session: Any) -> None:
    """Step until every row has ended."""
    while session.unfinished:
        session.step()


def test_a_group_prefills_its_prompt_once(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model(), config=SamplerConfig(block_size=4))
    prompt, params = list(range(1, 23)), SamplingParams(max_tokens=3, n=8)  # 5 full blocks and 2
    with sampler.session([prompt], params) as session:
        free = session.scheduler.stats()["free_blocks"]
        session.add_group(prompt, params, Rules(), prompt_id=0, step=0)
        session.step()
        stats = session.scheduler.stats()
        assert stats["prefill_tokens"] == len(prompt)
        assert free - stats["free_blocks"] == 6
        session.step()
        stats = session.scheduler.stats()
        assert stats["prefill_tokens"] == len(prompt)
        assert stats["decode_tokens"] == 8
        assert free - stats["free_blocks"] == 5 + 8, "full blocks shared, the partial one for each"
        run(session)
        assert session.scheduler.stats()["free_blocks"] == free


def test_members_of_a_group_differ(make_model: Callable[..., Any]) -> None:
    done = Sampler(make_model()).generate(PROMPTS, SamplingParams(max_tokens=24, n=16))
    for group in done:
        assert len({tuple(c.token_ids) for c in group}) == 16


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
def test_truncated_logprobs_and_kept_mass(
    temperature: float, make_model: Callable[..., Any]
) -> None:
    model = make_model()
    params = SamplingParams(
        max_tokens=20, n=2, temperature=temperature, top_k=40, top_p=0.9, min_p=0.02
    )
    for prompt, group in zip(PROMPTS, Sampler(model).generate(PROMPTS, params), strict=True):
        for done in group:
            full = (next_logits(model, prompt, done.token_ids) / temperature).log_softmax(-1)
            own = full.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
            kept = torch.tensor(done.kept_mass, dtype=torch.float64)
            assert bool((kept < 1).all())
            got = torch.tensor(done.logprobs, dtype=torch.float64)
            torch.testing.assert_close(got, own - kept.log(), atol=1e-5, rtol=0)


def test_temperature_schedule_counts_sampled_tokens(make_model: Callable[..., Any]) -> None:
    model = make_model()
    schedule = [1.0, 0.5, 2.0, 0.0, 0.7]
    params = SamplingParams(max_tokens=9, temperature_schedule=schedule, seed=3)
    (prompt,) = PROMPTS[1:2]
    ((done,),) = Sampler(model).generate([prompt], params)
    logits = next_logits(model, prompt, done.token_ids)
    for i, token in enumerate(done.token_ids):
        temperature = schedule[min(i, 4)]
        expected = (logits[i] / (temperature or 1.0)).log_softmax(-1)[token]
        assert done.logprobs[i] == pytest.approx(float(expected), abs=1e-5)
    assert done.token_ids[3] == int(logits[3].argmax())


def test_each_prompt_may_have_its_own_params(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    each = [SamplingParams(max_tokens=4 + i, n=1 + i, temperature=0.5 + i) for i in range(3)]
    together = sampler.generate(PROMPTS, each)
    for index, (prompt, params) in enumerate(zip(PROMPTS, each, strict=True)):
        alone = sampler.generate([prompt], params, prompt_ids=[index])[0]
        assert [c.token_ids for c in together[index]] == [c.token_ids for c in alone]
        assert len(alone) == 1 + index


def test_row_without_finite_logits_ends_and_the_others_go_on(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    params = SamplingParams(max_tokens=40, n=4, seed=1)
    clean = Sampler(model).generate(PROMPTS, params)
    poison = clean[0][0].token_ids[7]  # whoever has drawn this token has no next logits
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    got = Sampler(model).generate(PROMPTS, params)
    reasons = {c.finish_reason for group in got for c in group}
    assert reasons >= {"error", "length"}
    for before, after in zip(chain(*clean), chain(*got), strict=True):
        if poison in before.token_ids:
            end = before.token_ids.index(poison) + 1
            at_end = end == len(before.token_ids)
            assert after.finish_reason == (before.finish_reason if at_end else "error")
            assert after.token_ids == before.token_ids[:end]
            assert after.logprobs == pytest.approx(before.logprobs[:end], abs=1e-5)
        else:
            assert after.token_ids == before.token_ids


def prefilled(sampler: Sampler, prompt: Sequence[int]) -> int:
    """Tokens that a call on this prompt computes before it decodes."""
    params = SamplingParams(max_tokens=2)
    with sampler.session([prompt], params) as session:
        session.add_group(prompt, params, Rules(), prompt_id=0, step=0)
        run(session)
        return int(session.scheduler.stats()["prefill_tokens"])


def test_prefixes_are_found_again_until_the_weights_change(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    sampler = Sampler(model, config=SamplerConfig(block_size=4, num_blocks=64))
    prompt = list(range(30, 59))  # 29 tokens: 7 full blocks and 1
    assert prefilled(sampler, prompt) == 29
    assert prefilled(sampler, prompt) == 1
    assert prefilled(sampler, [*prompt[:10], 1, 2, 3]) == 13 - 8
    with torch.no_grad():
        next(model.parameters()).mul_(1.0)
    assert prefilled(sampler, prompt) == 29
    assert prefilled(sampler, prompt) == 1
    sampler.forget_prefixes()
    assert prefilled(sampler, prompt) == 29


def test_reused_prefixes_change_nothing(make_model: Callable[..., Any]) -> None:
    model, params = make_model(), SamplingParams(max_tokens=16, n=3, seed=2)
    prompts = [[*range(50, 70), i] for i in range(4)]
    cold = Sampler(model, config=SamplerConfig(prefix_cache=False, block_size=4))
    warm = Sampler(model, config=SamplerConfig(block_size=4))
    expected = cold.generate(prompts, params)
    for _ in range(2):
        got = warm.generate(prompts, params)
        assert [[c.token_ids for c in g] for g in got] == [
            [c.token_ids for c in g] for g in expected
        ]


@pytest.mark.parametrize("host_blocks", [0, 5, 64])
def test_parked_rows_lose_nothing_but_time(
    host_blocks: int, make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    """Rows that are parked at a frequent letter, in a pool that holds a third of them."""
    model, params = make_model(), SamplingParams(max_tokens=30, n=4, seed=4)
    rules = Rules(park=("e", "a", "t"))

    def texts(config: SamplerConfig) -> list[list[int]]:
        sampler = Sampler(model, bpe_tokenizer, config)
        with sampler.session(PROMPTS, params, foreign_tokens=80) as session:
            seqs = [
                s
                for i, p in enumerate(PROMPTS)
                for s in session.add_group(p, params, rules, prompt_id=i, step=0)
            ]
            parked: list[int] = []
            while session.unfinished:
                events = session.step()
                parked += [e.seq for e in events or () if e.kind == "parked"]
                for seq in parked:
                    session.expect_wait(seq, float(seq % 5))
                if events is None or len(parked) > 6:
                    for seq in sorted(parked):
                        session.inject(seq, [1 + seq % 7, 33, 44])
                    parked.clear()
            session.scheduler.check()
            return [session.row(seq).token_ids.tolist() for seq in seqs]

    roomy = texts(SamplerConfig(block_size=4))
    tight = texts(SamplerConfig(block_size=4, num_blocks=36, host_blocks=host_blocks))
    assert tight == roomy
    assert any(44 in row for row in roomy)


def test_bad_requests(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    size = sampler.vocab_size
    short = SamplingParams(max_tokens=3)
    with pytest.raises(ConfigError, match="prompt 1: 0 tokens"):
        sampler.generate([[1], []], short)
    with pytest.raises(ConfigError, match=r"prompt 0: 512 tokens, allowed are 1 to 511"):
        sampler.generate([[1] * 512], short)
    with pytest.raises(ConfigError, match=f"prompt 0: got token {size}, the model has tokens 0 to"):
        sampler.generate([[1, size]], short)
    with pytest.raises(ConfigError, match="stop_token_ids: got token -3"):
        sampler.generate([[1]], SamplingParams(max_tokens=3, stop_token_ids=[-3]))
    with pytest.raises(ConfigError, match="stop and banned_strings need a tokenizer"):
        sampler.generate([[1]], SamplingParams(max_tokens=3, stop=["x"]))
    with pytest.raises(ConfigError, match="params: got 1 for 2 prompts"):
        sampler.generate([[1], [2]], [short])
    tiny = Sampler(sampler.model, config=SamplerConfig(block_size=4, num_blocks=4))
    with pytest.raises(ConfigError, match=r"num_blocks: got 4 blocks of 4 tokens.*allowed is 6"):
        tiny.generate([[1, 2, 3]], SamplingParams(max_tokens=20))
    assert tiny.generate([[1, 2, 3]], short)[0][0].finish_reason in ("length", "stop")
    assert sampler.generate([], short) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"n": 0}, "n: got 0"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature_schedule": [1.0, -1.0]}, "temperature_schedule: got"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"min_p": 1.0}, "min_p: got 1.0"),
    ],
)
def test_bad_sampling_params_say_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**{"max_tokens": 3, **settings})
