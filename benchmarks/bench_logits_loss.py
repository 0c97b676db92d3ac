"""The loss over given logits, forward and backward, against eager torch and the copy bandwidth.

    python benchmarks/bench_logits_loss.py [--rows 512] [--vocab 151936] [--dtype bfloat16]
        [--threads 2] [--repeats 8] [--json FILE]

Values first: loss and gradient of every side must equal the float64 reference's (bfloat16: 2**-7 of
the gradient's norm, its rounding; float32: 1e-5) before a time is printed. "bytes" are one read of
the logits and one write of their gradient, what torch's `copy_` of the same tensor moves too; sides
take turns, and the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eapo_fast import _core, ops, recipes

SEQUENCES = 8


class Case:
    """Logits of a batch, and what each side computes."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(rows, vocab, generator=generator).to(dtype)
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        own = [
            x.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for x, ids in zip(self.logits.split(16), self.targets.split(16), strict=True)
        ]
        self.batch = ops.PolicyBatch(
            old_logprob=torch.cat(own) + 0.05 * torch.randn(rows, generator=generator),
            advantages=torch.randn(SEQUENCES, generator=generator),
            cu_seqlens=torch.arange(SEQUENCES + 1) * (rows // SEQUENCES),
        )

    def ours(self, x: Tensor, *, in_place: bool = False, backend: str = "cpu") -> Tensor:
        return ops.logits_policy_loss(
            x, self.targets, self.batch, recipes.get("eapo"), in_place=in_place, backend=backend
        ).loss

    def eager(self, x: Tensor) -> Tensor:
        logprob = x.log_softmax(-1).gather(1, self.targets[:, None])[:, 0].float()
        ratio = (logprob - self.batch.old_logprob).exp()
        each = self.batch.advantages.repeat_interleave(len(x) // SEQUENCES)
        return -torch.minimum(ratio * each, ratio.clamp(0.8, 1.28) * each).mean()


def computed(logits: Tensor) -> Tensor:
    """Return a copy that requires a gradient as the output of a model does."""
    return logits.requires_grad_().clone()


def gradient(x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return loss and gradient in `x`, which may be overwritten."""
    value = loss(x)
    (slope,) = torch.autograd.grad(value, x)
    return value.detach(), slope


def check(case: Case, name: str, loss: Callable[[Case, Tensor], Tensor], room: float) -> None:
    """Raise unless loss and gradient of a side are right."""
    want, slope = gradient(
        computed(case.logits.detach().double()), lambda x: case.ours(x, backend="reference")
    )
    got, own = gradient(computed(case.logits), lambda x: loss(case, x))
    error = float((own.double() - slope).norm() / slope.norm())
    assert error <= room, f"{name}: gradient off by {error:.1e} of its norm"
    assert abs(float(got - want)) <= room, f"{name}: loss {float(got)} instead of {float(want)}"


SIDES: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "in place": lambda case, x: case.ours(x, in_place=True),
    "new gradient": lambda case, x: case.ours(x),
    "eager": lambda case, x: case.eager(x),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Check and time every side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    room = 2**-7 if dtype == torch.bfloat16 else 1e-5
    small = Case(32, options.vocab, dtype)
    for name, loss in SIDES.items():
        check(small, name, loss, room if name != "eager" else 8 * room)
    case = Case(options.rows, options.vocab, dtype)
    other = torch.empty_like(case.logits)
    times = dict.fromkeys(("copy", *SIDES), float("inf"))
    for turn in range(options.repeats):
        source = case.logits.detach()
        times["copy"] = min(times["copy"], seconds(lambda source=source: other.copy_(source)))
        for name, loss in SIDES.items():
            if name == "eager" and turn >= 2:
                continue
            x = computed(case.logits)
            other.view(torch.uint8).sum(dtype=torch.uint8)  # what was written leaves the caches
            run = lambda x=x, loss=loss: gradient(x, lambda x: loss(case, x))  # noqa: E731
            times[name] = min(times[name], seconds(run))
    moved = 2 * case.logits.nbytes
    print(
        f"{options.rows} x {options.vocab} {options.dtype}, {_core.isa()}, {options.threads} "
        f"threads, load {os.getloadavg()[0]:.1f}"
    )
    for name, best in times.items():
        print(
            f"  {name:14} {best * 1e3:8.1f} ms  {best / options.rows * 1e6:7.1f} us a row  "
            f"{moved / best / 1e9:5.1f} GB/s  {times['copy'] / best:5.0%} of copy  "
            f"{times['eager'] / best:5.1f}x eager"
        )
    if options.json:
        lines = {
            name: {
                "ms": best * 1e3,
                "share_of_copy": times["copy"] / best,
                "times_eager": times["eager"] / best,
            }
            for name, best in times.items()
        }
        Path(options.json).write_text(json.dumps({"arguments": vars(options), **lines}, indent=1))


if __name__ == "__main__":
    main()
