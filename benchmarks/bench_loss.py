"""The LM-head loss, forward and backward, against its peers and its floor; one command.

    python benchmarks/bench_loss.py [--sizes small large] [--dtypes float32 bfloat16]
        [--sides cpu eager ...] [--threads 2] [--repeats 5] [--json FILE]

Values first: loss and gradients of every side must agree with the reference (float32: 1e-4 of the
norm; bfloat16: 2**-5, the rounding of the naive logits) before its time is printed. "bare" are the
matrix products of the plan that runs, cut as it cuts them, with the addition of the slabs' weight
gradients: the floor. "flop" are those of three products (four for what computes its logits twice),
"bytes" the logits that are read and written and the weight and its gradient. Sides take turns, the
best of the repeats counts. A side that cannot run here says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eapo_fast import _core, ops, recipes
from eapo_fast.kernels.linear_token_stats import cpu as cpu_head
from eapo_fast.kernels.linear_token_stats.coefficients import spans
from eapo_fast.kernels.linear_token_stats.products import products_for

SIZES = {"small": (4096, 256, 4096), "large": (1024, 896, 151_936)}
SIDES = ("bare", "cpu", "cpu 40 % active", "reference", "triton", "cuda", "eager", "torch.compile",
         "torch lce", "liger")  # fmt: skip
SEQUENCES = 8


class Case:
    """Head, targets and batch of one size."""

    def __init__(self, rows: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = (rows, width, vocab)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        self.hidden = normal(rows, width).to(device, dtype).requires_grad_()
        weight = normal(vocab, width) * width**-0.5
        self.weight = weight.to(device, dtype).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator).to(device)
        with torch.no_grad():
            found = ops.linear_token_stats(self.hidden, self.weight, self.targets)
        self.old = found.logprob + 0.05 * normal(rows).to(device)
        self.advantages = normal(SEQUENCES).to(device)
        self.cu = (torch.arange(SEQUENCES + 1) * (rows // SEQUENCES)).to(device)
        self.active = (torch.arange(rows) % 5 < 2).to(device)

    def ours(self, backend: str, *, masked: bool = False) -> Tensor:
        batch = ops.PolicyBatch(
            old_logprob=self.old,
            advantages=self.advantages,
            cu_seqlens=self.cu,
            mask=self.active if masked else None,
        )
        return ops.linear_policy_loss(
            self.hidden, self.weight, self.targets, batch, recipes.get("eapo"), backend=backend
        ).loss

    def naive(self) -> Tensor:
        """All logits, log_softmax, gather and the clipped loss, in the dtype of the head."""
        logits = self.hidden @ self.weight.T
        logprob = logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0].float()
        ratio = (logprob - self.old).exp()
        each = self.advantages.repeat_interleave(len(self.old) // SEQUENCES)
        return -torch.minimum(ratio * each, ratio.clamp(0.8, 1.28) * each).mean()

    def fused_cross_entropy(self) -> Tensor:
        """torch's own: its log-probabilities, then the clipped loss."""
        nll = F.linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none")
        ratio = (-nll.float() - self.old).exp()
        each = self.advantages.repeat_interleave(len(self.old) // SEQUENCES)
        return -torch.minimum(ratio * each, ratio.clamp(0.8, 1.28) * each).mean()

    def liger(self) -> Tensor:
        """Liger's chunked GRPO loss on sequences of equal length."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", compiled=False,
            use_ref_model=False,
        )  # fmt: skip
        shape = (SEQUENCES, -1)
        return loss(
            self.hidden.view(*shape, self.hidden.shape[1]), self.weight, self.targets.view(shape),
            torch.ones(SEQUENCES, len(self.old) // SEQUENCES, device=self.old.device),
            self.advantages, old_per_token_logps=self.old.view(shape),
        )[0]  # fmt: skip

    def bare(self) -> None:
        """The products of the CPU's plan and the sum of the weight's gradient, and nothing else."""
        rows, _, vocab = self.shape
        products, hidden, weight = (
            products_for(self.hidden.dtype), self.hidden.detach(), self.weight.detach()
        )  # fmt: skip
        slab = cpu_slab(self)
        total = torch.empty(weight.shape, dtype=products.storage)
        for first, (start, stop) in enumerate(spans(rows, slab, even=True)):
            x = hidden[start:stop]
            for left in range(0, vocab, cpu_head.TILE):
                columns = slice(left, min(left + cpu_head.TILE, vocab))
                if hidden.dtype == torch.bfloat16:
                    z = torch.mm(x, weight[columns].T)
                else:
                    z = products.logits(x, weight[columns], None, torch.empty(0))
                products.to_hidden(z, weight[columns])
                out = None if first else total[columns]
                part = products.to_weight(z, x, out)
                if first:
                    total[columns] += part


def cpu_slab(case: Case) -> int:
    """Rows of a slab of the CPU head."""
    head = cpu_head.CpuHead(
        case.hidden.detach(), case.weight.detach(), case.targets, bias=None, temperature=1.0,
        softcap=None, vocab_size=case.shape[2], banned=None, chunk_size=None,
    )  # fmt: skip
    return head.slab_rows(keep=True)


def losses(case: Case, device: str) -> dict[str, Callable[[], Tensor] | str]:
    """Return each side's loss, or why there is none."""
    compiled = torch.compile(case.naive, dynamic=False)
    gpu = device == "cuda"
    no_gpu = "needs a GPU"
    slow = case.shape[2] > 50_000 and not gpu
    return {
        "cpu": no_gpu.replace("a GPU", "the CPU") if gpu else lambda: case.ours("cpu"),
        "cpu 40 % active": "on the CPU" if gpu else lambda: case.ours("cpu", masked=True),
        "reference": lambda: case.ours("reference"),
        "triton": (lambda: case.ours("triton")) if gpu else no_gpu,
        "cuda": "there is no CUDA kernel for this op",
        "eager": case.naive,
        "torch.compile": compiled,
        "torch lce": "minutes a call at this size on a CPU" if slow else case.fused_cross_entropy,
        "liger": case.liger if importlib.util.find_spec("liger_kernel") else "is not installed",
    }


def gradients(case: Case, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    case.hidden.grad = case.weight.grad = None
    value = loss()
    value.backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    return value.detach(), case.hidden.grad, case.weight.grad


def check(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raise unless loss and gradients agree."""
    room = 1e-4 if got[1].dtype == torch.float32 else 2**-5
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=room, atol=room)
    for a, b in zip(got[1:], want[1:], strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error <= room, f"{name}: gradient off by {error:.1e}"


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def work(case: Case, name: str) -> tuple[float, float]:
    """Return flop and bytes of a side."""
    rows, width, vocab = case.shape
    share = 0.4 if "active" in name else 1.0
    twice = 4 if name in ("liger", "torch lce") else 3
    size = case.hidden.element_size()
    logits = 2 * rows * vocab * size * share
    return twice * 2.0 * rows * width * vocab * share, logits + 2 * vocab * width * size


def measure(case: Case, sides: list[str], repeats: int, device: str) -> list[dict[str, Any]]:
    """Check and time every side; print and return the lines."""
    known = losses(case, device)
    want = tuple(x.clone() for x in gradients(case, lambda: case.ours("reference")))
    masked = tuple(x.clone() for x in gradients(case, lambda: case.ours("reference", masked=True)))
    times: dict[str, float] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in sides:
        loss = case.bare if name == "bare" else known[name]
        if isinstance(loss, str):
            print(f"  {name:16} -- {loss}")
        elif name == "bare":
            if device == "cpu":
                runs[name] = case.bare
        else:
            check(name, gradients(case, loss), masked if "active" in name else want)  # type: ignore[arg-type]
            runs[name] = lambda loss=loss: gradients(case, loss)
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] = min(times.get(name, float("inf")), seconds(run))
    lines = []
    for name, best in sorted(times.items(), key=lambda item: item[1]):
        flop, moved = work(case, name)
        share = times["bare"] / best * (0.4 if "active" in name else 1) if "bare" in times else 0.0
        ratio = times.get("eager", float("nan")) / best
        lines.append({"side": name, "ms": best * 1e3, "flop": flop, "bytes": moved,
                      "share_of_floor": share, "times_eager": ratio})  # fmt: skip
        print(
            f"  {name:16} {best * 1e3:9.1f} ms  {flop / best / 1e12:5.2f} TFLOP/s  "
            f"{moved / 1e6:8.0f} MB  {share:4.0%} of the floor  {ratio:5.2f}x eager"
        )
    return lines


def main() -> None:
    """Measure every size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _core.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]
    print(f"{device}, {_core.isa()}, {options.threads} threads, torch {torch.__version__}, "
          f"load {load:.1f}")  # fmt: skip
    results: dict[str, Any] = {"isa": _core.isa(), "threads": options.threads, "load": load}
    for size in options.sizes:
        for dtype in options.dtypes:
            print(f"{size} {SIZES[size]} {dtype}")
            case = Case(*SIZES[size], getattr(torch, dtype), device)
            results[f"{size} {dtype}"] = measure(case, options.sides, options.repeats, device)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
