"""Random cases of the sampler's ops: attention over a paged cache, cache writes, draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_check.correctness import Trial, to_device
from gpu_check.records import RefusedError

# The float64 oracle of paged attention and its bounds are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/kernels/gpu"))

HEADS = ((14, 2, 64), (12, 2, 128), (6, 3, 24), (8, 1, 16), (2, 2, 256), (28, 4, 128), (3, 1, 72))
"""Query heads, key heads, head dimension."""
BLOCKS = (1, 5, 16, 64)


def paged_attention(trial: Trial) -> None:
    """Decode rows, chunks, padding and shared prefixes, plain and with every option."""
    from attention_cases import Step, worst_error

    from eapo_fast.kernels.paged_attention import paged_attention as op

    rng = trial.random
    longest = 90 if trial.small else 3000
    heads = HEADS[2:4] if trial.small else HEADS
    for case, (q_heads, kv_heads, dim) in enumerate(heads):
        if trial.backend == "cuda" and dim * trial.dtype.itemsize % 16:
            continue  # documented: whole 16 bytes
        lengths = [rng.randrange(1, longest) for _ in range(4 if trial.small else 7)]
        segments = [(1, n) for n in lengths] + [(min(n, rng.randrange(2, 40)), n) for n in lengths]
        segments += [(1, 0), (2, 0)]
        rng.shuffle(segments)
        options: dict[str, Any] = {}
        if case % 2:
            options = {"window": rng.randrange(1, longest), "softcap": rng.uniform(1, 30)}
        step = Step(
            segments=segments,
            q_heads=q_heads,
            kv_heads=kv_heads,
            dim=dim,
            block_size=rng.choice(BLOCKS[1:] if trial.small else BLOCKS),
            dtype=trial.dtype,
            options=options,
            sinks=case % 3 == 2 and trial.backend != "flash",
            seed=rng.randrange(2**31),
        )
        _attend(trial, op, worst_error, step, f"{q_heads}/{kv_heads} heads of {dim}, {options}")
    if trial.backend == "triton":
        _shared(trial, op, worst_error, Step)


def _shared(trial: Trial, op: Any, worst_error: Any, make: Any) -> None:
    """Groups of decode rows that begin with the same blocks."""
    rng = trial.random
    members, prefix = 5, 16 * (rng.randrange(2, 5) if trial.small else rng.randrange(30, 120))
    own = [rng.randrange(1, 60) for _ in range(members + 1)]
    segments = [(1, prefix + n) for n in own[:members]] + [(1, own[members]), (7, 9 + own[0])]
    step = make(
        segments=segments,
        spans=[(0, members, prefix)],
        q_heads=6,
        kv_heads=2,
        dim=64,
        dtype=trial.dtype,
        seed=rng.randrange(2**31),
    )
    _attend(trial, op, worst_error, step, f"{members} rows share {prefix} keys")


def _attend(trial: Trial, op: Any, worst_error: Any, step: Any, what: str) -> None:
    arguments = step.arguments(trial.device)
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    want = {name: arguments[name].clone() for name in before}
    live = arguments["slots"] >= 0
    for name, new in (("k_cache", "k"), ("v_cache", "v")):
        want[name].flatten(0, 1)[arguments["slots"][live]] = arguments[new][live]
    got = trial.call(op, **arguments)
    for name, written in want.items():
        same = torch.equal(written.nan_to_num(7.0), arguments[name].nan_to_num(7.0))
        trial.take(f"{name} after the call, {what}", 0.0 if same else float("inf"))
        arguments[name].copy_(before[name])
    trial.take(what, worst_error(got, arguments))
    again = trial.call(op, **arguments)
    trial.take(f"bits of a second call, {what}", 0.0 if torch.equal(again, got) else float("inf"))


def kv_write(trial: Trial) -> None:
    """Bytes go where they should and nowhere else."""
    from eapo_fast.kernels.kv_write import kv_write as op

    rng = trial.random
    for _ in range(3 if trial.small else 8):
        heads, dim, size = rng.randrange(1, 5), rng.choice([1, 7, 24, 64, 128]), rng.choice(BLOCKS)
        tokens = rng.randrange(1, 60 if trial.small else 900)
        blocks = tokens // size + 3
        slots = torch.randperm(blocks * size, generator=trial.generator)[:tokens]
        slots[torch.rand(tokens, generator=trial.generator) < 0.2] = -1
        k, v = trial.normal(tokens, heads, dim), trial.normal(tokens, heads, dim)
        caches = [trial.normal(blocks, size, heads, dim) for _ in range(2)]
        want = [cache.clone() for cache in caches]
        for cache, new in zip(want, (k, v), strict=True):
            cache.flatten(0, 1)[slots[slots >= 0]] = new[slots >= 0]
        got = [to_device(cache, trial.device) for cache in caches]
        trial.call(op, *(to_device(x, trial.device) for x in (k, v)), *got, slots.to(trial.device))
        _equal(trial, f"{tokens} tokens of {heads} x {dim}", got, want)


def copy_blocks(trial: Trial) -> None:
    """Whole blocks of all layers; a source is read before a later pair overwrites it."""
    from eapo_fast.kernels.kv_write import copy_blocks as op

    rng = trial.random
    for _ in range(3 if trial.small else 8):
        blocks = rng.randrange(6, 40)
        shapes = [(blocks, rng.choice(BLOCKS), rng.randrange(1, 4), rng.choice([1, 5, 64, 128]))
                  for _ in range(rng.randrange(1, 9))]  # fmt: skip
        caches = [trial.normal(*shape) for shape in shapes]
        order = torch.randperm(blocks, generator=trial.generator).int()
        count = rng.randrange(1, blocks // 2)
        sources = order[:count][trial.integers(count, count)]  # some twice
        pairs = torch.stack([sources, order[count : 2 * count]], dim=1).contiguous()
        want = [cache.clone() for cache in caches]
        for cache in want:
            cache[pairs[:, 1].long()] = cache[pairs[:, 0].long()]
        got = [to_device(cache, trial.device) for cache in caches]
        trial.call(op, got, pairs.to(trial.device))
        _equal(trial, f"{count} pairs in {len(shapes)} caches", got, want)


def _equal(trial: Trial, what: str, got: list[Tensor], want: list[Tensor]) -> None:
    same = all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    trial.take(what, 0.0 if same else float("inf"))


def sample(trial: Trial) -> None:
    """Draws with settings of each row's own; a number on a border may fall on either side of it."""
    from eapo_fast.kernels.sample import sample as op

    rng = trial.random
    sizes = (1, 37, 3001) if trial.small else (1, 37, 4097, 50_257, 151_936)
    for vocab in sizes:
        count = 6 if trial.small else 40
        rows = max(1, count // 2)
        arguments = {
            "logits": trial.normal(rows, vocab, scale=rng.choice([0.5, 3.0])),
            "rows": trial.integers(rows, count).int(),
            "uniforms": torch.rand(count, generator=trial.generator),
            "temperatures": _choices(trial, count, [0.0, 0.7, 1.0, 3.0]),
            "top_ks": _choices(trial, count, [0, 1, 5, 40]).int(),
            "top_ps": _choices(trial, count, [1.0, 0.9, 0.3]),
            "min_ps": _choices(trial, count, [0.0, 0.05]),
            "banned": (trial.integers(count, 4).int(), trial.integers(max(1, vocab // 2), 4).int()),
        }
        want = op(**{**arguments, "logits": arguments["logits"].double()}, backend="reference")
        got = trial.call(op, **to_device(arguments, trial.device))
        tokens, logprobs, kept = (x.cpu() for x in got)
        alike = tokens == want.tokens
        for ours, theirs in ((logprobs, want.logprobs), (kept, want.kept_mass)):
            near = (ours.double() - theirs).abs() <= 1e-4 * (1 + theirs.abs())
            alike &= near | (ours.isnan() & theirs.isnan())
        trial.take(f"rows that differ, V = {vocab}", float((~alike).sum()) / max(1, count // 20))


def _choices(trial: Trial, count: int, values: list[float]) -> Tensor:
    return torch.tensor([float(trial.random.choice(values)) for _ in range(count)])


FORMS: tuple[dict[str, bool], ...] = (
    {},
    {"cast_before_weight": False},
    {"cast_before_weight": False, "unit_offset": True},
)
"""Spellings of an RMS norm: Llama's, OLMo 2's, Gemma's."""


def rms_norm(trial: Trial) -> None:
    """Rows at a distance, alone and after a residual sum, whose bits are torch's."""
    from eapo_fast.kernels.rms_norm import add_rms_norm as add
    from eapo_fast.kernels.rms_norm import rms_norm as op

    rng = trial.random
    widths = (1, 48, 100) if trial.small else (1, 64, 100, 896, 1536, 3584, 8192, 10_001)
    for width in widths:
        rows, form = rng.randrange(1, 9 if trial.small else 700), rng.choice(FORMS)
        wide, residual = trial.normal(rows, width + 3), trial.normal(rows, width)
        x, weight = wide[:, 2:-1], trial.normal(width)
        inputs = [wide.to(trial.device)[:, 2:-1], weight.to(trial.device), 1e-5]
        want = op(x.double(), weight.double(), 1e-5, **form, backend="reference")
        got = trial.call(op, *inputs, **form)
        trial.compare(f"{rows} rows of {width}, {form}", got, want, _rounding(trial))
        total, normed = trial.call(add, inputs[0], residual.to(trial.device),
                                   *inputs[1:], **form)  # fmt: skip
        _equal(trial, f"sum of {rows} x {width}", [total], [x + residual])
        again = trial.call(op, total, *inputs[1:], **form)
        _equal(trial, f"norm of that sum, {form}", [normed], [again.cpu()])


def gated_activation(trial: Trial) -> None:
    """Halves of one product, and tensors of their own."""
    from eapo_fast.kernels.gated_activation import KINDS
    from eapo_fast.kernels.gated_activation import gated_activation as op

    rng = trial.random
    for width in (1, 48, 100) if trial.small else (1, 100, 1000, 4864, 18_944):
        rows, kind = rng.randrange(1, 9 if trial.small else 300), rng.choice(KINDS)
        both = trial.normal(rows, 2 * width, scale=3.0)
        gate, up = both.chunk(2, dim=-1)
        want = op(gate.double(), up.double(), kind, backend="reference")
        got = trial.call(op, *both.to(trial.device).chunk(2, dim=-1), kind)
        trial.compare(f"{rows} rows of {width}, {kind}", got, want, _rounding(trial))
        again = trial.call(op, gate.contiguous().to(trial.device), up.to(trial.device), kind)
        _equal(trial, f"{rows} rows of {width}, apart", [again], [got.cpu()])


def rotary(trial: Trial) -> None:
    """Bit for bit what torch gives; then the same with keys and values written into a cache."""
    from eapo_fast.kernels.rotary import rotary as op
    from eapo_fast.kernels.rotary import rotary_kv_write as write

    rng = trial.random
    for q_heads, k_heads, dim in HEADS[2:4] if trial.small else HEADS:
        tokens, turned = (
            rng.randrange(1, 9 if trial.small else 600),
            rng.choice([dim, dim // 4 * 2]),
        )
        angles = torch.randn(1, tokens, turned, generator=trial.generator)
        kind = rng.choice([trial.dtype, torch.float32])
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        q, k, v = (trial.normal(1, tokens, n, dim) for n in (q_heads, k_heads, k_heads))
        want = op(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend="reference")
        here = [x.to(trial.device) for x in (q, k, v, cos, sin)]
        got = trial.call(op, here[0].transpose(1, 2), here[1].transpose(1, 2), *here[3:])
        what = f"{tokens} tokens, {q_heads}/{k_heads} heads of {dim}, {turned} turned by {kind}"
        _equal(trial, what, list(got), list(want))
        slots = torch.randperm(tokens + 5, generator=trial.generator)[:tokens]
        caches = [torch.zeros(tokens + 5, 1, k_heads, dim, dtype=trial.dtype) for _ in "kv"]
        filled = [cache.clone() for cache in caches]
        filled[0][slots, 0], filled[1][slots, 0] = want[1][0].transpose(0, 1), v[0]
        caches = [cache.to(trial.device) for cache in caches]
        out = trial.call(write, *(x[0] for x in here), *caches, slots.to(trial.device))
        _equal(
            trial, f"into a cache, {what}", [out, *caches], [want[0][0].transpose(0, 1), *filled]
        )


def _rounding(trial: Trial) -> float:
    """Bound of the relative error of a float32 result that was rounded twice."""
    return {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(trial.dtype, 0.0) + 2e-6


def fused_modules(trial: Trial) -> None:
    """Small random models: every module of theirs that is known is fused, and logits stay."""
    if trial.device == "cpu" or trial.backend != "triton":
        raise RefusedError("backend: fused modules take Triton on a GPU")
    from eapo_fast.engine.fused import fused_modules as fuse
    from gpu_check.sampler import random_model

    ids = trial.integers(200, 2, 40).to(trial.device)
    for kind, fused in (("llama", 16), ("qwen2", 16), ("qwen3", 22), ("gemma2", 22)):
        model = random_model(kind).to(trial.device, trial.dtype)
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
            with fuse(model):
                found = sum("forward" in vars(module) for module in model.modules())
                got = model(ids, use_cache=False).logits
        trial.take(f"{kind}: {found} modules of {fused} are fused", 0.0 if found == fused else 9.0)
        trial.compare(f"{kind}: logits", got, want.cpu(), 16 * _rounding(trial))


CASES = {
    "paged_attention": paged_attention,
    "kv_write": kv_write,
    "copy_blocks": copy_blocks,
    "sample": sample,
    "rms_norm": rms_norm,
    "gated_activation": gated_activation,
    "rotary": rotary,
    "fused_modules": fused_modules,
}
"""The sampler's ops by name."""
