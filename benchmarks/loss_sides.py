"""The sides of the LM-head loss benchmark: what each one computes, and what it has to move."""

from __future__ import annotations

import importlib.util
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
from eapo_fast.kernels.native import triton_is_interpreted

SIDES = ("bare", "reference", "cpu", "cpu 40 % active", "triton", "triton 40 % active", "cuda",
         "eager", "torch.compile", "torch lce", "liger", "liger triton")  # fmt: skip
SEQUENCES = 8
MOST_INTERPRETED = 1 << 21
"""Logits that Triton's interpreter gets through in seconds."""

Side = Callable[[], Tensor] | str
"""A loss to be differentiated, or why there is none."""


class Case:
    """Head, targets and batch of one size."""

    def __init__(self, rows: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.device = (rows, width, vocab), device

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

    def clipped(self, logprob: Tensor) -> Tensor:
        """The clipped loss of log-probabilities in plain torch."""
        ratio = (logprob.float() - self.old).exp()
        each = self.advantages.repeat_interleave(len(self.old) // SEQUENCES)
        return -torch.minimum(ratio * each, ratio.clamp(0.8, 1.28) * each).mean()

    def naive(self) -> Tensor:
        """All logits, log_softmax, gather and the clipped loss, in the dtype of the head."""
        logits = self.hidden @ self.weight.T
        return self.clipped(logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0])

    def fused_cross_entropy(self) -> Tensor:
        """torch's own: its log-probabilities, then the clipped loss."""
        nll = F.linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none")
        return self.clipped(-nll)

    def liger(self) -> Tensor:
        """Liger's chunked GRPO loss on sequences of equal length, with its own defaults."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", use_ref_model=False
        )
        shape = (SEQUENCES, -1)
        found: Tensor = loss(
            self.hidden.view(*shape, self.hidden.shape[1]), self.weight, self.targets.view(shape),
            torch.ones(SEQUENCES, len(self.old) // SEQUENCES, device=self.old.device),
            self.advantages, old_per_token_logps=self.old.view(shape),
        )[0]  # fmt: skip
        return found

    def liger_triton(self) -> Tensor:
        """Liger's Triton GRPO loss behind a plain LM head; it drops a sequence's last logits."""
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        rows = self.hidden.view(SEQUENCES, -1, self.hidden.shape[1])
        padded = torch.cat([rows, rows[:, :1].detach()], dim=1)
        shape = rows.shape[:2]
        found = triton_grpo_loss(
            padded @ self.weight.T, self.old.view(shape), None, self.targets.view(shape),
            self.advantages, None, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.28,
        )  # fmt: skip
        each: Tensor = found[0] if isinstance(found, tuple) else found
        return each.mean()

    def bare(self) -> None:
        """The products of the plan and the sum of the weight's gradient, and nothing else."""
        if self.device == "cpu":
            _bare_cpu(self)
        else:
            _bare_gpu(self)


def _bare_cpu(case: Case) -> None:
    rows, _, vocab = case.shape
    products, hidden, weight = (
        products_for(case.hidden.dtype), case.hidden.detach(), case.weight.detach()
    )  # fmt: skip
    total = torch.empty(weight.shape, dtype=products.storage)
    for first, (start, stop) in enumerate(spans(rows, _cpu_slab(case), even=True)):
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
            if not part.is_contiguous():
                _core.take_transposed(total[columns], part.T, add=first > 0)
            elif first:
                total[columns] += part


def _bare_gpu(case: Case) -> None:
    """cuBLAS, on the slabs of the Triton plan: float32 logits and sums, the rest as stored."""
    from eapo_fast.kernels.linear_token_stats.triton_kernel import SLAB_BYTES

    rows, _, vocab = case.shape
    hidden, weight = case.hidden.detach(), case.weight.detach()
    total = torch.zeros(weight.shape, device=weight.device)
    for start, stop in spans(rows, max(1, SLAB_BYTES // (4 * vocab)), even=False):
        x = hidden[start:stop]
        dz = _product(x, weight.T).to(x.dtype)
        _product(dz, weight)
        total += _product(dz.T, x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def _cpu_slab(case: Case) -> int:
    """Rows of a slab of the CPU head."""
    head = cpu_head.CpuHead(
        case.hidden.detach(), case.weight.detach(), case.targets, bias=None, temperature=1.0,
        softcap=None, vocab_size=case.shape[2], banned=None, chunk_size=None,
    )  # fmt: skip
    return head.slab_rows(keep=True)


def sides_of(case: Case) -> dict[str, Side]:
    """Return each side's loss, or why there is none; "bare" has none."""
    gpu = case.device != "cpu"
    slow = case.shape[2] > 50_000 and not gpu
    found: dict[str, Side] = {
        "reference": lambda: case.ours("reference"),
        "cpu": "needs the CPU" if gpu else lambda: case.ours("cpu"),
        "cpu 40 % active": "needs the CPU" if gpu else lambda: case.ours("cpu", masked=True),
        "cuda": "there is no CUDA kernel for this op",
        "eager": case.naive,
        "torch.compile": torch.compile(case.naive, dynamic=False),
        "torch lce": "minutes a call at this size on a CPU" if slow else case.fused_cross_entropy,
    }
    why = _no_triton(case, gpu)
    found["triton"] = why or (lambda: case.ours("triton"))
    found["triton 40 % active"] = why or (lambda: case.ours("triton", masked=True))
    missing = None if importlib.util.find_spec("liger_kernel") else "is not installed"
    found["liger"] = missing or case.liger
    found["liger triton"] = missing or why or case.liger_triton
    return found


def _no_triton(case: Case, gpu: bool) -> str | None:
    """Return why the Triton kernels cannot take part, or None."""
    if gpu:
        return None
    if not triton_is_interpreted():
        return "needs a GPU; TRITON_INTERPRET=1 compares its values where they are few"
    if case.shape[0] * case.shape[2] > MOST_INTERPRETED:
        return "its interpreter would take minutes at this size"
    return None


def timed(case: Case, name: str) -> bool:
    """Return whether the time of a side means anything: that of an interpreter does not."""
    return not (case.device == "cpu" and "triton" in name)


def work(case: Case, name: str) -> tuple[float, float]:
    """Return flop, and the bytes that any way with these products has to move.

    Logits are written and read once, in float32 by our Triton kernels; weight and its gradient
    once. "liger" and "torch lce" compute logits twice.
    """
    rows, width, vocab = case.shape
    share = active_share(name)
    products = 4 if name in ("liger", "torch lce") else 3
    size = case.hidden.element_size()
    logits = 2 * rows * vocab * (4 if name.startswith("triton") else size) * share
    return products * 2.0 * rows * width * vocab * share, logits + 2 * vocab * width * size


def active_share(name: str) -> float:
    """Return the share of the rows that take part."""
    return 0.4 if "active" in name else 1.0


def gradients(case: Case, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and gradients of hidden states and weight."""
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


def extra_memory(case: Case, run: Callable[[], Any]) -> float:
    """Return the peak memory of one run over what was there and the gradients it leaves; bytes.

    On a CPU, of the resident set; NaN where /proc does not tell.
    """
    case.hidden.grad = case.weight.grad = None
    if case.device == "cpu":
        before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return float("nan")
        run()
        peak = _resident("VmHWM")
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    left = sum(x.grad.nbytes for x in (case.hidden, case.weight) if x.grad is not None)
    return max(0.0, float(peak - before - left))


def _resident(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return 0
