"""Stage 5: each kernel of the sampler alone, against the bytes and flops it cannot do without.

The launches of docs/kernels.md, replayed as graphs, so that the host's part of a launch is left
out; every backend that a GPU has for them. Values first: some rows against float64. Sizes exceed
the L2 cache where a launch of that kind does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_check.hardware import Ceilings, measure_ceilings, milliseconds, release, replayed
from gpu_check.records import Recorder, RefusedError, Request

HEADS, KV_HEADS, DIM, BLOCK = 14, 2, 64, 64
VOCAB = 151_936
TOLERANCE = 2**-7
"""Of results in bfloat16, in the norm."""


@dataclass(frozen=True)
class Launch:
    """One kernel at one size."""

    name: str
    run: Callable[..., Any]
    """Calls it, given `backend`."""
    error: Callable[[str], float]
    """Its error on a backend, in the norm."""
    bytes: float
    """Least traffic of memory."""
    flops: float = 0.0
    backends: tuple[str, ...] = ("triton", "cuda")


def run(request: Request, recorder: Recorder) -> None:
    """Measure every launch on every backend that takes it."""
    ceilings = measure_ceilings(request, recorder)
    makers = (decode, shared_decode, chunk, draws, truncated_draws, norms, rotations, activations,
              writes, copies)  # fmt: skip
    backends = ("triton", "cuda") if request.device == "cuda" else ("auto",)
    for backend in backends:  # one by one: a kernel that faults takes the device from the others
        for make in makers:
            if request.remaining() < 4:
                recorder.skip(f"{make.__name__} {backend}", "the time box is used up")
                continue
            with recorder.guard(f"{make.__name__} {backend}"):
                for launch in make(request):
                    if backend in ("auto", *launch.backends):
                        _measure(launch, backend, ceilings, request, recorder)
            release(request.device)


def _measure(
    launch: Launch, backend: str, ceilings: Ceilings, request: Request, recorder: Recorder
) -> None:
    floor = max(launch.bytes / ceilings.copy, launch.flops / ceilings.gemm) * 1e3
    name = f"{launch.name}, {backend}"
    with recorder.guard(name):
        error = _called(launch.error, backend)
        recorder.check(f"values of {name}", error < TOLERANCE, error=error)
        if not error < TOLERANCE:
            return
        work = replayed(partial(launch.run, backend=backend), request.device)
        spent = milliseconds(work, request.device, repeats=2 if request.small else 30)
        recorder.figure(name, 1e3 * spent, "us", floor_us=1e3 * floor)
        recorder.figure(f"{name}: share of its floor", floor / spent, "")


def _called(call: Callable[[str], Any], backend: str) -> Any:
    try:
        return call(backend)
    except ValueError as error:
        if str(error).startswith("backend:"):
            raise RefusedError(str(error)) from None
        raise


def _dtype(request: Request) -> torch.dtype:
    return torch.bfloat16 if request.device == "cuda" else torch.float32


def _normal(request: Request, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator(request.device).manual_seed(request.seed)
    values = torch.randn(shape, generator=generator, device=request.device)
    return values.to(dtype or _dtype(request))


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _step(request: Request, rows: int, keys: int, queries: int = 1) -> dict[str, Any]:
    """Arguments of attention: segments of `queries` rows at the end of `keys` keys."""
    device, width = request.device, -(-keys // BLOCK)
    blocks = torch.randperm(rows * width, generator=torch.Generator().manual_seed(request.seed))
    tables = blocks.int().view(rows, width).to(device)
    at = torch.arange(keys - queries, keys, device=device)
    slots = tables[:, at // BLOCK].long() * BLOCK + at % BLOCK
    caches = [_normal(request, rows * width, BLOCK, KV_HEADS, DIM) for _ in "kv"]
    new = [_normal(request, rows * queries, KV_HEADS, DIM) for _ in "kv"]
    cuts = torch.arange(rows + 1, device=device, dtype=torch.int32) * queries
    return {
        "q": _normal(request, rows * queries, HEADS, DIM),
        "k": new[0],
        "v": new[1],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slots": slots.flatten(),
        "cu_q": cuts,
        "kv_lens": torch.full((rows,), keys, dtype=torch.int32, device=device),
        "block_tables": tables,
        "scale": DIM**-0.5,
        "longest": (queries, keys),
    }


def _attention(name: str, step: dict[str, Any], moved: float, flops: float = 0.0) -> Launch:
    from eapo_fast.kernels.paged_attention import paged_attention

    def error(backend: str) -> float:
        got = paged_attention(**step, backend=backend)
        first = int(step["cu_q"][1])
        wide = {
            k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for k, x in step.items()
            if k not in ("shared", "longest")
        }
        one = {k: wide[k][:first] for k in ("q", "k", "v", "slots")}
        one |= {"cu_q": wide["cu_q"][:2], "kv_lens": wide["kv_lens"][:1]}
        one |= {"block_tables": wide["block_tables"][:1]}
        return _distance(got[:first], paged_attention(**wide | one, backend="reference"))

    return Launch(name, partial(paged_attention, **step), error, moved, flops)


def _pair_bytes(request: Request) -> int:
    """Bytes of a key and its value."""
    return 2 * KV_HEADS * DIM * _dtype(request).itemsize


def decode(request: Request) -> list[Launch]:
    """Rows of decoding, nothing shared."""
    rows, keys = (4, 130) if request.small else (256, 2048)
    moved = float(rows * keys * _pair_bytes(request))
    return [_attention(f"decode, {rows} x {keys} keys", _step(request, rows, keys), moved)]


def shared_decode(request: Request) -> list[Launch]:
    """The same in groups of 8 that begin alike."""
    rows, keys, common = (8, 200, 128) if request.small else (256, 2048, 512)
    step, groups = _step(request, rows, keys), rows // 8
    tables = step["block_tables"].view(groups, 8, -1)
    tables[:, :, : common // BLOCK] = tables[:, :1, : common // BLOCK].clone()
    starts = torch.arange(groups, dtype=torch.int32, device=request.device) * 8
    spans = torch.stack([starts, torch.full_like(starts, 8)], 1).contiguous()
    step["shared"] = spans, torch.full_like(starts, common)
    moved = float((rows * (keys - common) + groups * common) * _pair_bytes(request))
    name = f"decode, {rows} x {keys} keys, {common} of them shared by 8"
    return [_attention(name, step, moved)]


def chunk(request: Request) -> list[Launch]:
    """A prompt without a past."""
    tokens = 70 if request.small else 2048
    step = _step(request, 1, tokens, tokens)
    row = _dtype(request).itemsize * DIM
    moved = float(tokens * row * (2 * HEADS + 4 * KV_HEADS))
    flops = 4.0 * HEADS * DIM * tokens * tokens / 2
    launch = _attention(f"chunk of {tokens} tokens", step, moved, flops)
    return [launch]


def _draw(request: Request, dtype: torch.dtype, top_p: float) -> Launch:
    from eapo_fast.kernels.sample import sample

    rows, vocab = (4, 300) if request.small else (256, VOCAB)
    device = request.device
    logits = _normal(request, rows, vocab, dtype=dtype)
    ask: dict[str, Any] = {
        "rows": torch.arange(rows, dtype=torch.int32, device=device),
        "uniforms": torch.rand(rows, device=device),
        "temperatures": torch.ones(rows, device=device),
        "top_ks": torch.zeros(rows, dtype=torch.int32, device=device),
        "top_ps": torch.full((rows,), top_p, device=device),
        "min_ps": torch.zeros(rows, device=device),
    }

    def error(backend: str) -> float:
        got = sample(logits, **ask, backend=backend)
        want = logits[:4].double().log_softmax(-1).gather(1, got.tokens[:4, None])[:, 0]
        return _distance(got.logprobs[:4] + got.kept_mass[:4].log(), want)

    kind = str(dtype).removeprefix("torch.") + (f", top-p {top_p}" if top_p < 1 else "")
    moved = float(logits.nbytes)
    return Launch(f"{rows} draws, {kind}", partial(sample, logits, **ask), error, moved)


def draws(request: Request) -> list[Launch]:
    """Draws from float32 and bfloat16 logits; they are read once."""
    return [_draw(request, dtype, 1.0) for dtype in (torch.float32, torch.bfloat16)]


def truncated_draws(request: Request) -> list[Launch]:
    """Draws with top-p; the floor is that of one reading, there are more."""
    return [_draw(request, torch.float32, 0.9)]


def norms(request: Request) -> list[Launch]:
    """A norm with the sum before it, for a step of decoding and a long chunk."""
    from eapo_fast.kernels.rms_norm import add_rms_norm

    def launch(rows: int, width: int) -> Launch:
        x, residual = _normal(request, rows, width), _normal(request, rows, width)
        weight = _normal(request, width)

        def error(backend: str) -> float:
            got = add_rms_norm(x, residual, weight, 1e-6, backend=backend)
            want = torch.nn.functional.rms_norm(got[0].double(), (width,), weight.double(), 1e-6)
            return _distance(got[1], want)

        run = partial(add_rms_norm, x, residual, weight, 1e-6)
        moved = 4.0 * x.nbytes
        return Launch(f"norm of a sum, {rows} x {width}", run, error, moved, backends=("triton",))

    sizes = ((3, 32),) if request.small else ((256, 896), (65_536, 896), (16_384, 3584))
    return [launch(*size) for size in sizes]


def rotations(request: Request) -> list[Launch]:
    """Rotary embedding of queries and keys."""
    from eapo_fast.kernels.rotary import rotary

    def launch(tokens: int) -> Launch:
        q, k = (_normal(request, 1, tokens, n, DIM).transpose(1, 2) for n in (HEADS, KV_HEADS))
        angles = torch.rand(1, tokens, DIM, device=request.device)
        cos, sin = (f(angles).to(q.dtype) for f in (torch.cos, torch.sin))

        def error(backend: str) -> float:
            wide = [x[:, :, :4].double() for x in (q, k)]
            want = rotary(*wide, cos[:, :4].double(), sin[:, :4].double(), backend="reference")
            got = rotary(q, k, cos, sin, backend=backend)
            pairs = zip(got, want, strict=True)
            return max(_distance(g[:, :, :4], w) for g, w in pairs)

        run = partial(rotary, q, k, cos, sin)
        moved = 2.0 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        return Launch(f"rotary, {tokens} tokens", run, error, moved, backends=("triton",))

    return [launch(n) for n in ((5,) if request.small else (256, 65_536))]


def activations(request: Request) -> list[Launch]:
    """The gate of an MLP."""
    from eapo_fast.kernels.gated_activation import gated_activation

    def launch(rows: int, width: int) -> Launch:
        gate, up = _normal(request, rows, width), _normal(request, rows, width)

        def error(backend: str) -> float:
            want = torch.nn.functional.silu(gate[:4].double()) * up[:4].double()
            return _distance(gated_activation(gate, up, "silu", backend=backend)[:4], want)

        run = partial(gated_activation, gate, up, "silu")
        name = f"gated activation, {rows} x {width}"
        return Launch(name, run, error, 3.0 * gate.nbytes, backends=("triton",))

    sizes = ((3, 48),) if request.small else ((256, 4864), (16_384, 4864))
    return [launch(*size) for size in sizes]


def writes(request: Request) -> list[Launch]:
    """New keys and values of a step into the cache: the launch is what it costs."""
    from eapo_fast.kernels.kv_write import kv_write

    rows = 4 if request.small else 256
    step = _step(request, rows, 2 * BLOCK)
    given = [step[name] for name in ("k", "v", "k_cache", "v_cache", "slots")]

    def error(backend: str) -> float:
        given[2].zero_()
        kv_write(*given, backend=backend)
        return _distance(given[2].flatten(0, 1)[given[4]], given[0])

    run = partial(kv_write, *given)
    return [Launch(f"kv_write, {rows} tokens", run, error, 4.0 * step["k"].nbytes)]


def copies(request: Request) -> list[Launch]:
    """Blocks of all layers for groups that part."""
    from eapo_fast.kernels.kv_write import copy_blocks

    pairs, layers, blocks = (2, 3, 8) if request.small else (32, 48, 512)
    caches = [_normal(request, blocks, BLOCK, KV_HEADS, DIM) for _ in range(layers)]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(request.seed)).int()
    chosen = order[: 2 * pairs].view(pairs, 2).contiguous().to(request.device)

    def error(backend: str) -> float:
        copy_blocks(caches, chosen, backend=backend)
        source, target = chosen.long().unbind(1)
        return max(_distance(c[target], c[source]) for c in (caches[0], caches[-1]))

    run = partial(copy_blocks, caches, chosen)
    moved = 2.0 * pairs * layers * caches[0][0].nbytes
    return [Launch(f"copy_blocks, {pairs} pairs in {layers} caches", run, error, moved)]
