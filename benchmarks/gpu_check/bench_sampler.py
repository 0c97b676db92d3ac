"""Stage 5: decoding against `generate`, `generate_batch` and the floor of a decode step.

Random-weight models of Qwen2.5's shapes, rows in groups of 8 that share a prompt, temperature 1.
The floor of a step is its matrix products (all weights, replayed as one graph) plus the keys and
values that must be read at the copy bandwidth, a group's prompt once; both measured here. The share
judges the median decode-only step: forward, draw, and the tokens' way back to the host.
"""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from gpu_check import shapes
from gpu_check.hardware import Ceilings, measure_ceilings, milliseconds, release, replayed
from gpu_check.records import Bar, Recorder, Request

SAMPLES = 8
BARS = {("0.5B", 256): 0.6, ("0.5B", 1024): 0.75}
"""Least shares of the floor."""
TOLERANCE = 0.1
"""Of bfloat16 log-probabilities: another batch rounds differently."""


@dataclass(frozen=True)
class Case:
    """One workload."""

    shape: str
    rows: int
    prompt: int
    new: int


CASES = (
    Case("0.5B", 256, 960, 128),
    Case("0.5B", 1024, 960, 96),
    Case("1.5B", 256, 960, 96),
    Case("1.5B", 1024, 960, 64),
)
SMALL_CASES = (Case("tiny", 16, 20, 8),)


def run(request: Request, recorder: Recorder) -> None:
    """Measure every workload, then the peers on those of the 0.5B shape, then on the rest."""
    ceilings = measure_ceilings(request, recorder)
    cases = SMALL_CASES if request.small else CASES
    rates: dict[Case, float] = {}
    for case in cases:
        name = f"{case.shape} shape, {case.rows} rows"
        if request.remaining() < 10:
            recorder.skip(name, "the time box is used up")
            continue
        with recorder.guard(name):
            rates[case] = _measure(name, case, ceilings, request, recorder)
        release(request.device)
    for case in cases:
        _generate(case, rates.get(case), request, recorder)
        release(request.device)
    with recorder.guard("generate_batch", optional=True):
        _generate_batch(cases[0], rates.get(cases[0]), request, recorder)


def _model(case: Case, request: Request) -> Any:
    dtype = torch.float32 if request.device == "cpu" else torch.bfloat16
    return shapes.qwen2(case.shape, request.device, dtype)


def _prompts(case: Case, vocab: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.rows // SAMPLES, case.prompt)
    found: list[list[int]] = torch.randint(1, vocab, shape, generator=generator).tolist()
    return found


def _measure(
    name: str, case: Case, ceilings: Ceilings, request: Request, recorder: Recorder
) -> float:
    """Sample twice, check the log-probabilities, time the decode steps; returns tokens a second."""
    from eapo_fast import Sampler, SamplerConfig, SamplingParams
    from eapo_fast.engine import Rules

    model = _model(case, request)
    prompts = _prompts(case, model.config.vocab_size, request.seed)
    block = 64 if request.device == "cuda" else 16
    config = SamplerConfig(max_batch=case.rows, block_size=block, max_prefill_tokens=16_384,
                           prefix_cache=False, host_blocks=0)  # fmt: skip
    sampler = Sampler(model, config=config)
    params = SamplingParams(max_tokens=case.new, n=SAMPLES, seed=request.seed)
    totals, steps = [], []
    for _ in range(2):  # the first compiles and captures
        start = time.perf_counter()
        with sampler.session(prompts, params) as session:
            rows = [
                (prompt, seq)
                for i, prompt in enumerate(prompts)
                for seq in session.add_group(prompt, params, Rules(), prompt_id=i, step=0)
            ]
            steps = _timed_steps(session, case.rows)
            totals.append(time.perf_counter() - start)
            chosen = [(p, session.row(seq)) for p, seq in rows[:: max(1, len(rows) // 6)]]
    error = _logprob_error(model, chosen)  # outside of the session: by transformers' own forward
    recorder.check(f"log-probabilities, {name}", error < TOLERANCE, largest_error=error)
    spent = statistics.median(steps)
    parts = floor_parts(model, case, ceilings, request)
    floor = parts["gemm_ms"] + parts["kv_ms"]
    limit = BARS.get((case.shape, case.rows))
    detail = {**parts, "decode_only_steps": len(steps), "context": case.prompt + case.new // 2}
    recorder.figure(f"decode step, {name}", spent, "ms", **detail)
    recorder.figure(
        f"decode step, {name}: share of GEMM + KV floor",
        floor / spent,
        "",
        Bar(">=", limit) if limit else None,
        unshared_floor_ms=parts["gemm_ms"] + parts["kv_unshared_ms"],
    )
    rate = case.rows * case.new / totals[-1]
    recorder.figure(f"sampler, {name}, prompts included", rate, "tokens/s")
    return rate


def _timed_steps(session: Any, rows: int) -> list[float]:
    """Run a session; returns milliseconds of the steps in which every row got one token."""
    times = []
    while session.unfinished:
        before = session.scheduler.stats()
        start = time.perf_counter()
        session.step()
        spent = time.perf_counter() - start
        after = session.scheduler.stats()
        pure = after["prefill_tokens"] == before["prefill_tokens"]
        if pure and after["decode_tokens"] - before["decode_tokens"] == rows:
            times.append(1e3 * spent)
    if not times:
        raise RuntimeError("no step decoded all rows at once: the pool is too small for them")
    return times


@torch.no_grad()
@torch.no_grad()
def _logprob_error(model: Any, rows: list[tuple[list[int], Any]]) -> float:
    worst = 0.0
    for prompt, row in rows:
        ids = torch.tensor([[*prompt, *row.token_ids.tolist()]], device=model.device)
        logits = model(ids, logits_to_keep=len(row.token_ids) + 1).logits[0, :-1].float()
        tokens = torch.from_numpy(row.token_ids).to(model.device)
        want = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
        worst = max(worst, float((torch.from_numpy(row.logprobs) - want).abs().max()))
    return worst


def floor_parts(model: Any, case: Case, ceilings: Ceilings, request: Request) -> dict[str, float]:
    """Return the milliseconds that one decode step of all rows cannot do without."""
    config, device = model.config, request.device
    embedding = model.get_input_embeddings().weight
    weights = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    weights.append(model.get_output_embeddings().weight)
    inputs = {
        size: torch.randn(case.rows, size, device=device, dtype=model.dtype)
        for size in {w.shape[1] for w in weights}
    }

    @torch.no_grad()
    def products() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    repeats = 3 if request.small else 20
    gemm = milliseconds(replayed(products, device), device, repeats=repeats)
    dim = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * model.dtype.itemsize
    own = case.rows * (case.new / 2) * token
    prompts = case.rows * case.prompt * token
    per_ms = ceilings.copy / 1e3
    return {
        "gemm_ms": gemm,
        "kv_ms": (own + prompts / SAMPLES) / per_ms,
        "kv_unshared_ms": (own + prompts) / per_ms,
    }


def _config(new: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )


def _generate(case: Case, own: float | None, request: Request, recorder: Recorder) -> None:
    """Time `generate` with all rows in flight, once, after a few tokens of warm-up."""
    name = f"generate, {case.shape} shape, {case.rows} rows"
    if request.remaining() < 15 and not request.small:
        recorder.skip(name, "the time box is used up")
        return
    with recorder.guard(name, optional=True):
        model = _model(case, request)
        prompts = torch.tensor(_prompts(case, model.config.vocab_size, request.seed))
        everything = prompts.repeat_interleave(SAMPLES, 0).to(request.device)

        def sample(ids: torch.Tensor, new: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=_config(new)
                )
            if out.shape[1] != case.prompt + new:
                raise RuntimeError(f"got {out.shape[1] - case.prompt} tokens, not {new}")
            if request.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        sample(everything[:SAMPLES], 2)
        rate = case.rows * case.new / sample(everything, case.new)
        recorder.figure(name, rate, "tokens/s")
        if own is not None:
            recorder.figure(f"{name}: ours over it", own / rate, "x")


def _generate_batch(case: Case, own: float | None, request: Request, recorder: Recorder) -> None:
    """Time transformers' continuous batching, last: it may take what is left of the time."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    name, page = f"generate_batch, {case.shape} shape, {case.rows} rows", 32
    if request.remaining() < 12:
        recorder.skip(name, "the time box is used up")
        return
    model = _model(case, request)
    new = min(case.new, 32)
    config = _config(new)
    config.eos_token_id = -1
    prompts = _prompts(case, model.config.vocab_size, request.seed)
    prompts = [prompt for prompt in prompts for _ in range(SAMPLES)]  # 5.17 returns one of each
    blocks = case.rows * (-(-(case.prompt + new) // page) + 1)
    known = inspect.signature(ContinuousBatchingConfig).parameters
    settings = {
        "page_size" if "page_size" in known else "block_size": page,  # its name before 5.18
        "num_blocks": blocks,
        "max_batch_tokens": 2048,
        "max_requests_per_batch": case.rows,
    }
    batching = ContinuousBatchingConfig(**{k: v for k, v in settings.items() if k in known})

    def sample() -> float:
        start = time.perf_counter()
        out = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching
        )
        if sum(len(row.generated_tokens) for row in out.values()) != case.rows * new:
            raise RuntimeError("generate_batch lost tokens: nothing was timed")
        return time.perf_counter() - start

    rate = case.rows * new / sample()
    recorder.figure(f"{name}, first call, {new} tokens a row", rate, "tokens/s")
    if own is not None:
        recorder.figure(f"{name}: ours over it", own / rate, "x")
