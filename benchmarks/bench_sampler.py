"""Sampling against transformers' `generate` and `generate_batch`: same model, prompts and lengths.

    python benchmarks/bench_sampler.py [--out benchmarks/results/sampler_cpu.json]
    pytest benchmarks/bench_sampler.py

A random Qwen2 of 6.8 M parameters (hidden 256, 6 layers, 8 query and 2 key heads, vocabulary 4096)
samples 8 completions of 32 prompts of 32..96 tokens, at temperature 1 without truncation or stop
tokens, either 128 tokens each or 16..256 (drawn for each row). Values first: the log-probabilities
must be the ordinary forward's before a time is printed (`generate` returns none). `generate` runs
left-padded with all rows in flight, `generate_batch` with 32 rows at once: their best settings on a
CPU. Repeats of the contenders alternate; ratios are medians over repeats.

The floor of a decode step is the sum of parts measured in the same run: the matrix products of all
weights at 256 rows, the KV read at the measured bandwidth, and one sampling call.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria

from eapo_fast.engine import Rules, Sampler, SamplingParams
from eapo_fast.kernels.sample import sample

PROMPTS, SAMPLES, FIXED, SHORTEST, LONGEST = 32, 8, 128, 16, 256
ROWS = PROMPTS * SAMPLES
VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS = 4096, 256, 6, 8, 2
BATCH_ROWS = 32
"""Rows at once at which `generate_batch` is fastest on this workload."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Of log-probabilities; a bfloat16 forward rounds differently in another batch."""


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    model: Any
    prompts: list[list[int]]
    lengths: list[int]
    """New tokens of each row, rows of one prompt together."""

    @property
    def tokens(self) -> int:
        """Tokens that count: those that each row wants."""
        return sum(self.lengths)


def build_model(dtype: torch.dtype) -> Any:
    """Return the random model, without stop tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


def build_work(dtype: torch.dtype, *, varied: bool = False) -> Work:
    """Return model, prompts of 32 to 96 random tokens and the rows' lengths."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(32, 97, (PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in sizes]
    drawn = torch.randint(SHORTEST, LONGEST + 1, (ROWS,), generator=generator).tolist()
    return Work(build_model(dtype), prompts, drawn if varied else [FIXED] * ROWS)


def run_ours(sampler: Sampler, work: Work) -> list[tuple[list[int], list[int], Tensor]]:
    """Sample; returns prompt, token ids and log-probabilities of every row."""
    params = SamplingParams(max_tokens=max(work.lengths), n=SAMPLES)
    rows = []
    with sampler.session(work.prompts, params) as session:
        left = {}
        for index, prompt in enumerate(work.prompts):
            seqs = session.add_group(prompt, params, Rules(), prompt_id=index, step=0)
            wanted = work.lengths[index * SAMPLES :][:SAMPLES]
            left.update({seq: (prompt, n) for seq, n in zip(seqs, wanted, strict=True)})
        due = [(n, seq) for seq, (_, n) in left.items()]  # a row gets one token a step at most
        heapq.heapify(due)
        step = 0
        while session.unfinished:
            session.step()
            step += 1
            while due and due[0][0] <= step:
                seq = heapq.heappop(due)[1]
                missing = left[seq][1] - len(session.row(seq).token_ids)
                if missing:
                    heapq.heappush(due, (step + missing, seq))
                elif seq in session.unfinished:
                    session.finish(seq, "length")
        for seq, (prompt, n) in left.items():
            row = session.row(seq)
            assert len(row.token_ids) == n
            rows.append((prompt, row.token_ids.tolist(), torch.from_numpy(row.logprobs)))
    return rows


class _EndOfRow(StoppingCriteria):  # type: ignore[misc]
    """Ends row i after `lengths[i]` new tokens."""

    def __init__(self, width: int, lengths: Sequence[int]) -> None:
        self._ends = width + torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self._ends


def _generation_config(longest: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )


def run_generate(work: Work) -> None:
    """Sample with `generate`, left-padded, every row at once."""
    work.model.set_attn_implementation("sdpa")
    width = max(map(len, work.prompts))
    rows = [[0] * (width - len(p)) + p for p in work.prompts for _ in range(SAMPLES)]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in work.prompts for _ in range(SAMPLES)]
    with torch.inference_mode():
        out = work.model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            generation_config=_generation_config(max(work.lengths)),
            stopping_criteria=[_EndOfRow(width, work.lengths)],
        )
    assert out.shape[1] == width + max(work.lengths)


def run_generate_batch(work: Work) -> None:
    """Sample with `generate_batch` (continuous batching, paged cache), fixed lengths only."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    work.model.set_attn_implementation("sdpa")
    page = 32
    row_blocks = -(-(max(map(len, work.prompts)) + FIXED) // page) + 1
    config = _generation_config(FIXED)
    config.num_return_sequences = SAMPLES
    config.eos_token_id = -1
    out = work.model.generate_batch(
        work.prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page,
            num_blocks=ROWS * row_blocks,
            max_batch_tokens=1024,
            max_requests_per_batch=BATCH_ROWS,
            use_cuda_graph=False,
            use_async_batching=False,
            return_logprobs=True,
        ),
    )
    assert len(out) == ROWS
    assert all(len(row.generated_tokens) == FIXED for row in out.values())


def check(work: Work, rows: Sequence[tuple[list[int], list[int], Tensor]]) -> float:
    """Return the largest log-probability error of every 16th row; assert that it is small."""
    worst = 0.0
    for prompt, token_ids, logprobs in rows[::16]:
        with torch.no_grad():
            logits = work.model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        worst = max(worst, float((logprobs - expected).abs().max()))
    assert worst < TOLERANCE[work.model.dtype], worst
    return worst


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the shortest of some wall times: a floor."""
    return min(seconds(work) for _ in range(repeats))


def floor_seconds(work: Work) -> dict[str, float]:
    """Return the parts of the shortest decode step of all rows, seconds."""
    dtype = work.model.dtype
    hidden = torch.randn(ROWS, HIDDEN).to(dtype)
    products = [p for n, p in work.model.named_parameters() if p.ndim == 2]  # tied head: once
    inputs = {size: torch.randn(ROWS, size).to(dtype) for size in {p.shape[1] for p in products}}
    gemm = best(lambda: [inputs[p.shape[1]] @ p.T for p in products])
    context = sum(map(len, work.prompts)) / PROMPTS + statistics.mean(work.lengths) / 2
    kv_bytes = 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * dtype.itemsize * context * ROWS
    block = torch.randn(1 << 26)  # 256 MB, no cache holds it
    bandwidth = block.numel() * 4 / best(lambda: block.sum(), 5)
    logits = (hidden @ work.model.get_output_embeddings().weight.T).detach()
    ones, off = torch.ones(ROWS), torch.zeros(ROWS, dtype=torch.int32)
    draw = best(
        lambda: sample(
            logits,
            rows=torch.arange(ROWS, dtype=torch.int32),
            uniforms=ones / 2,
            temperatures=ones,
            top_ks=off,
            top_ps=ones,
            min_ps=ones * 0,
        )
    )
    return {"gemm": gemm, "kv_read": kv_bytes / bandwidth, "sample": draw}


def measure(
    dtype: torch.dtype, *, varied: bool, repeats: int, peers: Sequence[str]
) -> dict[str, Any]:
    """Time all contenders in turns; returns rates, ratios and the share of the floor."""
    work = build_work(dtype, varied=varied)
    sampler = Sampler(work.model)
    error = check(work, run_ours(sampler, work))
    contenders: dict[str, Callable[[], object]] = {
        "eapo_fast": lambda: run_ours(sampler, work),
        "generate": lambda: run_generate(work),
        "generate_batch": lambda: run_generate_batch(work),
    }
    times: dict[str, list[float]] = {name: [] for name in ("eapo_fast", *peers)}
    for _ in range(repeats):
        for name, spent in times.items():
            spent.append(seconds(contenders[name]))
    floor = floor_seconds(work)
    full_steps = work.tokens / ROWS  # as if every step were full
    result = {
        "workload": "lengths 16..256" if varied else "128 tokens a row",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": work.tokens,
        "tokens_per_s": {n: round(work.tokens / statistics.median(t)) for n, t in times.items()},
        "max_logprob_error": error,
        "floor_ms_per_step": {name: round(1e3 * part, 3) for name, part in floor.items()},
        "share_of_floor": round(
            full_steps * sum(floor.values()) / statistics.median(times["eapo_fast"]), 3
        ),
    }
    for peer in peers:
        ratios = sorted(b / a for a, b in zip(times["eapo_fast"], times[peer], strict=True))
        result[f"times_{peer}"] = {
            "median": round(statistics.median(ratios), 2),
            "range": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
    return result


CASES: list[tuple[str, torch.dtype, bool, dict[str, float]]] = [
    ("fp32-fixed", torch.float32, False, {"generate": 2.5, "generate_batch": 7.0}),
    ("bf16-fixed", torch.bfloat16, False, {"generate": 3.0}),
    ("fp32-varied", torch.float32, True, {"generate": 4.0}),
]
"""Name, dtype, varied lengths, and how many times a peer's rate is to be reached."""


@pytest.mark.parametrize(
    ("dtype", "varied", "bars"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def bench_sampler(benchmark: Any, dtype: torch.dtype, varied: bool, bars: dict[str, float]) -> None:
    """The bars of the sampler, one repeat against each peer."""
    result = benchmark.pedantic(
        measure,
        kwargs={"dtype": dtype, "varied": varied, "repeats": 1, "peers": list(bars)},
        rounds=1,
    )
    benchmark.extra_info.update(result)
    for peer, bar in bars.items():
        assert result[f"times_{peer}"]["median"] >= bar, result


def hardware() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Print one JSON line for each case, and write all of them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=[c[0] for c in CASES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = []
    for name, dtype, varied, bars in CASES:
        if options.only in (None, name):
            results.append(measure(dtype, varied=varied, repeats=options.repeats, peers=list(bars)))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"hardware": hardware(), "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
