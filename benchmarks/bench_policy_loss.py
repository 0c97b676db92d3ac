"""Policy losses over given log-probabilities against eager torch and the copy bandwidth.

    python benchmarks/bench_policy_loss.py [--tokens 1000000] [--threads 2] [--repeats 30]

Values first: every loss must equal the float64 reference's before a time is printed. Times are the
best of the repeats. "bytes" are one read of the inputs and one write of the outputs (coefficient
and loss of each token); the copy is torch's `copy_` of 256 MB, read and write counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eapo_fast import _core, ops, recipes
from eapo_fast.kernels.policy_loss.compiled import method_of
from eapo_fast.recipes import Recipe

SEQUENCE = 1000


def build_case(tokens: int) -> dict[str, Any]:
    """Return packed sequences of 1000 tokens, a fifth of them masked out."""
    generator = torch.Generator().manual_seed(0)
    sequences = tokens // SEQUENCE
    logprob = -3 * torch.rand(tokens, generator=generator)
    return {
        "logprob": logprob,
        "old_logprob": logprob + 0.1 * torch.randn(tokens, generator=generator),
        "advantages": torch.randn(sequences, generator=generator),
        "cu_seqlens": torch.arange(sequences + 1) * SEQUENCE,
        "mask": torch.rand(tokens, generator=generator) > 0.2,
        "ref_logprob": logprob + 0.1 * torch.randn(tokens, generator=generator),
        "entropy": torch.rand(tokens, generator=generator),
    }


def eager(case: dict[str, Any], recipe: Recipe) -> Tensor:
    """The loss in plain torch."""
    advantages = case["advantages"].repeat_interleave(SEQUENCE)
    ratio = (case["logprob"] - case["old_logprob"]).exp()
    clipped = ratio.clamp(1 - recipe.epsilon, 1 + recipe.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if recipe.beta:
        excess = case["logprob"] - case["ref_logprob"]
        loss = loss + recipe.beta * ((-excess).exp() + excess - 1)
    if recipe.entropy_coef:
        loss = loss - recipe.entropy_coef * case["entropy"]
    if "mask" not in case:
        return loss.mean()
    return (loss * case["mask"]).sum() / case["mask"].sum()


def best(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest of `repeats` runs in seconds."""
    shortest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def kernel_only(case: dict[str, Any], recipe: Recipe) -> Callable[[], None]:
    """Return a call of the compiled kernel with outputs that are there already."""
    tokens = len(case["logprob"])
    outputs = torch.empty(3, tokens)
    sums = torch.empty(_core.POLICY_SUMS, dtype=torch.float64)
    names = ("logprob", "old_logprob", "advantages", "cu_seqlens")
    method = method_of(recipe)

    def run() -> None:
        _core.policy_loss(
            *(case[name] for name in names),
            mask=case.get("mask"),
            ref_logprob=case.get("ref_logprob"),
            entropy=case.get("entropy"),
            factor=None,
            method=method,
            num_tokens=-1.0,
            num_sequences=-1.0,
            a=outputs[0],
            b=outputs[1] if recipe.entropy_coef else None,
            token_loss=outputs[2],
            sums=sums,
        )

    return run


def measure(name: str, case: dict[str, Any], recipe: Recipe, copy: float, repeats: int) -> None:
    """Check the values of one case and print its line."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    found = ops.policy_loss(**case, recipe=recipe, backend="cpu")
    wanted = ops.policy_loss(**wide, recipe=recipe, backend="reference")
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.a.double(), wanted.a, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(eager(case, recipe).double(), wanted.loss, rtol=1e-3, atol=1e-6)

    tokens = len(case["logprob"])
    read = sum(v.numel() * v.element_size() for k, v in case.items() if k != "cu_seqlens")
    moved = read + (12 if recipe.entropy_coef else 8) * tokens
    leaf = case["logprob"].requires_grad_()

    def both(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf.grad = None
            loss().backward()

        return run

    def ours() -> Tensor:
        return ops.policy_loss(**case, recipe=recipe).loss

    kernel = best(kernel_only(case, recipe), repeats)
    forward, full = best(ours, repeats), best(both(ours), repeats)
    plain, torch_full = (
        best(lambda: eager(case, recipe), repeats),
        best(both(lambda: eager(case, recipe)), repeats),
    )
    leaf.requires_grad_(False)
    share = moved / kernel / copy
    print(
        f"{name:18} {moved / 1e6:6.1f} MB  kernel {kernel * 1e3:6.2f} ms ({share:4.0%} of copy)  "
        f"call {forward * 1e3:6.2f}  with backward {full * 1e3:6.2f}  "
        f"eager {plain * 1e3:6.2f}, {torch_full * 1e3:6.2f}  ({torch_full / full:4.1f}x)"
    )


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _core.set_num_threads(options.threads)
    source = torch.randn(32_000_000)
    target = torch.empty_like(source)
    size = 2 * source.numel() * source.element_size()
    case, eapo = build_case(options.tokens // SEQUENCE * SEQUENCE), recipes.get("eapo")
    for name, recipe, without in (
        ("eapo", eapo, ("mask", "ref_logprob", "entropy")),
        ("eapo, mask", eapo, ("ref_logprob", "entropy")),
        ("all terms, mask", eapo.replace(beta=0.1, entropy_coef=0.01), ()),
    ):
        copy = size / best(lambda: target.copy_(source), max(4, options.repeats // 4))
        print(f"copy {copy / 1e9:.1f} GB/s, {_core.isa()}, {options.threads} threads")
        given = {k: v for k, v in case.items() if k not in without}
        measure(name, given, recipe, copy, options.repeats)


if __name__ == "__main__":
    main()
