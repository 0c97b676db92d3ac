"""Sampling against transformers' `generate`, same model, prompts and lengths, in one run.

    python benchmarks/bench_sampler.py [--repeats 3] [--threads 2]

Values first: the sampler's log-probabilities must equal the ordinary forward's before a time is
printed. `generate` runs left-padded with all rows in flight, its best setting on a CPU. Both sample
at temperature 1 without truncation or stop tokens; ours also returns log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from eapo_fast.engine import Sampler, SamplingParams

PROMPTS, SAMPLES, NEW_TOKENS = 32, 8, 128


def build_model() -> Any:
    """Return a random Qwen2 of 6.8 M parameters, float32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def build_prompts() -> list[list[int]]:
    """Return prompts of 32 to 96 random tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 97, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(1, 4096, (n,), generator=generator).tolist() for n in lengths]


def check(model: Any, prompts: list[list[int]], completions: Any) -> float:
    """Return the largest difference to the ordinary log-probabilities; assert that it is small."""
    worst = 0.0
    for prompt, group in list(zip(prompts, completions, strict=True))[:4]:
        done = group[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + done.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        worst = max(worst, float((torch.tensor(done.logprobs) - expected).abs().max()))
    assert worst < 1e-4, worst
    return worst


def run_ours(sampler: Sampler, prompts: list[list[int]]) -> Any:
    """Sample with the paged sampler."""
    return sampler.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, n=SAMPLES))


def run_generate(model: Any, prompts: list[list[int]]) -> None:
    """Sample with `generate`, left-padded, every row at once."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(p)) + p for p in prompts for _ in range(SAMPLES)]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(SAMPLES)]
    with torch.no_grad():
        model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )


def main() -> None:
    """Print one JSON line: tokens per second of both and their ratio, medians over repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, prompts = build_model(), build_prompts()
    sampler = Sampler(model)
    error = check(model, prompts, run_ours(sampler, prompts))
    times: dict[str, list[float]] = {"eapo_fast": [], "generate": []}
    for _ in range(options.repeats):
        for name, work in (
            ("eapo_fast", lambda: run_ours(sampler, prompts)),
            ("generate", lambda: run_generate(model, prompts)),
        ):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    tokens = PROMPTS * SAMPLES * NEW_TOKENS
    rates = {name: tokens / statistics.median(spent) for name, spent in times.items()}
    ratios = [b / a for a, b in zip(times["eapo_fast"], times["generate"], strict=True)]
    print(
        json.dumps(
            {
                "tokens_per_s": {k: round(v) for k, v in rates.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "max_logprob_error": error,
                "threads": options.threads,
                "repeats": options.repeats,
            }
        )
    )


if __name__ == "__main__":
    main()
