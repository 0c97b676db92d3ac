"""Stage 3: the sampler against `generate`, its log-probabilities, and captured decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from gpu_check.records import Recorder, Request

TIE = 1e-3
"""Two greedy choices whose logits are this close are one choice: float32 rounds either way."""


def run(request: Request, recorder: Recorder) -> None:
    """Check the demo's policy and small random models of other architectures."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    models: dict[str, Callable[[], Any]] = {"demo policy": _demo_policy}
    kinds = ("gemma2",) if request.small else ("qwen3", "gemma2", "gpt2", "phi3")
    models |= {kind: partial(random_model, kind) for kind in kinds}
    for name, build in models.items():
        model = None
        with recorder.guard(f"{name}: model", optional=name != "demo policy"):
            model = build().to(request.device)
        if model is None:
            continue
        if request.remaining() < 8:
            recorder.skip(name, "the time box is used up")
            continue
        with recorder.guard(f"{name}: greedy tokens are those of generate"):
            _greedy(name, model, request, recorder)
        with recorder.guard(f"{name}: captured decode steps"):
            _captured(name, model, request, recorder)
        for dtype in (torch.float32, torch.bfloat16):
            with recorder.guard(f"{name}: log-probabilities, {dtype}"):
                _logprobs(name, model.to(dtype), request, recorder)


def _demo_policy() -> Any:
    from transformers import AutoModelForCausalLM

    from eapo_fast.demo import POLICY

    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


def random_model(kind: str) -> Any:
    """Return a small random model whose attention weighs in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    if kind == "gemma2":
        settings |= {"sliding_window": 24, "attn_logit_softcapping": 5.0}
        settings |= {"final_logit_softcapping": 10.0, "query_pre_attn_scalar": 32}
    # Not every transformers gives a model with soft caps an attention that has them.
    how = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), **how)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    return model.float().eval()


def _prompts(model: Any, request: Request) -> list[list[int]]:
    generator = torch.Generator().manual_seed(request.seed)
    count, vocab = (3, 200) if request.small else (9, 200)
    sizes = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in sizes]


def _greedy(name: str, model: Any, request: Request, recorder: Recorder) -> None:
    """One row at a time through `generate`; all at once, in groups, through the sampler."""
    from eapo_fast import Sampler, SamplerConfig, SamplingParams

    prompts, tokens = _prompts(model, request), 12 if request.small else 64
    sampler = Sampler(model, config=SamplerConfig(block_size=16, max_prefill_tokens=50))
    params = SamplingParams(max_tokens=tokens, temperature=0.0, n=2)
    rows = sampler.generate(prompts, params)
    ties, wrong = 0, []
    for index, (prompt, group) in enumerate(zip(prompts, rows, strict=True)):
        want = _generate(model, prompt, tokens, sampler.eos_token_ids)
        for row in group:
            place = _first_difference(row.token_ids, want)
            if place is None:
                continue
            logits = _logits(model, prompt + want[:place])[-1]
            tied = (
                place < min(len(row.token_ids), len(want))
                and abs(float(logits[row.token_ids[place]] - logits[want[place]])) < TIE
            )
            ties += tied
            wrong += [] if tied else [f"row {index}, token {place}"]
    recorder.check(
        f"{name}: greedy tokens are those of generate", not wrong, rows=2 * len(prompts),
        tokens=tokens, ties=ties, wrong=wrong[:5],
    )  # fmt: skip


@torch.no_grad()
def _generate(model: Any, prompt: Sequence[int], tokens: int, eos: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def _first_difference(got: Sequence[int], want: Sequence[int]) -> int | None:
    if list(got) == list(want):
        return None
    pairs = zip(got, want, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(want)))


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int]) -> Any:
    return model(torch.tensor([list(ids)], device=model.device)).logits[0].float()


def _captured(name: str, model: Any, request: Request, recorder: Recorder) -> None:
    """Captured steps give the bits of the same static steps run one by one, also after an update.

    Without a GPU nothing is captured: static steps are compared with ordinary ones, to rounding.
    """
    from eapo_fast import Sampler, SamplerConfig, SamplingParams

    on_gpu = request.device == "cuda"
    prompts = _prompts(model, request)
    params = SamplingParams(max_tokens=10 if request.small else 48, n=3, seed=request.seed)
    config = SamplerConfig(block_size=16)
    captured, eager = Sampler(model, config=config), Sampler(model, config=config)
    for label in ("", " after an update in place"):
        with _static_steps(captured if not on_gpu else eager):
            got, want = (s.generate(prompts, params) for s in (captured, eager))
        pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
        worst = max(_gap(a.logprobs, b.logprobs) for a, b in pairs)
        same = all(a.token_ids == b.token_ids for a, b in pairs)
        recorder.check(
            f"{name}: captured decode steps{label}",
            same and (worst == 0.0 if on_gpu else worst < 1e-4),
            largest_difference=worst,
            rows=len(pairs),
        )
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.01)
    if on_gpu:
        graphs = captured._graphs
        recorder.check(
            f"{name}: decode steps were captured",
            graphs is not None and graphs[1].capture and bool(graphs[1]._captured),
        )


def _gap(a: Sequence[float], b: Sequence[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=False)), default=0.0)


@contextmanager
def _static_steps(sampler: Any) -> Iterator[None]:
    """Run the sampler's decode steps on static buffers, without capture."""
    from eapo_fast.engine.graphs import DecodeGraphs

    def uncaptured(pool: Any, paged: Any) -> DecodeGraphs:
        return DecodeGraphs(sampler.model, pool.cache, windows=paged.windows, capture=False)

    sampler._graphs_of = uncaptured
    try:
        yield
    finally:
        del sampler._graphs_of


def _logprobs(name: str, model: Any, request: Request, recorder: Recorder) -> None:
    """Sampled log-probabilities against float64 logits; the bar is the ordinary forward's error."""
    from eapo_fast import Sampler, SamplingParams

    prompts = _prompts(model, request)[:3]
    params = SamplingParams(max_tokens=10 if request.small else 40, n=2, seed=request.seed + 1)
    rows = Sampler(model).generate(prompts, params)
    pairs = [(p, row.token_ids) for p, group in zip(prompts, rows, strict=True) for row in group]
    plain = [_scored(model, *pair) for pair in pairs]
    dtype = model.dtype
    model.double()
    exact = [_scored(model, *pair) for pair in pairs]
    model.to(dtype)
    flat = torch.tensor([x for group in rows for row in group for x in row.logprobs])
    ours = float((flat.double() - torch.cat(exact)).abs().max())
    theirs = float((torch.cat(plain) - torch.cat(exact)).abs().max())
    room = 1e-4 if dtype == torch.float32 else 0.02
    recorder.check(
        f"{name}: log-probabilities, {str(dtype).removeprefix('torch.')}",
        ours <= 2 * theirs + room,
        largest_error=ours,
        largest_error_of_the_ordinary_forward=theirs,
    )


@torch.no_grad()
def _scored(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of each id by the ordinary forward, float64 on the CPU."""
    both = torch.tensor([[*prompt, *ids]], device=model.device)
    logits = model(both).logits[0, len(prompt) - 1 : -1].double().cpu()
    return logits.log_softmax(-1).gather(1, torch.tensor(list(ids))[:, None])[:, 0]
