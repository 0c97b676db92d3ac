"""Random cases of the sampler's ops: attention over a paged cache, cache writes, draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_check.correctness import Trial, to_device

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


CASES = {
    "paged_attention": paged_attention,
    "kv_write": kv_write,
    "copy_blocks": copy_blocks,
    "sample": sample,
}
"""The sampler's ops by name."""
