"""Stage 5: losses behind an LM head and over given logits, against peers and floors.

Values first: loss and gradients of some rows against float64 before any time is taken, and each
peer's loss against ours. Floors are three matrix products at the rate of a large bfloat16 product,
and bytes at the bandwidth of a large copy, both measured in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_check import loss_work
from gpu_check.hardware import Ceilings, measure_ceilings, milliseconds, release
from gpu_check.loss_work import Work
from gpu_check.records import Bar, Recorder, RefusedError, Request

BARS = {("7B", 32_768): 155.0, ("0.5B", 32_768): 44.0}
"""Milliseconds, forward and backward, all rows active, on an H200."""
AGAINST_LIGER = 1.5
COPY_SHARE = 0.9
ACTIVE_ROOM = 1.15
"""Time of partly active rows over the full time times their share of the work."""
MEMORY_ROOM = 1.1
"""Extra memory over one slab of float32 logits and the float32 gradient of the weight."""
SLAB_ROWS = 4096
TOLERANCE = 2**-7
"""Of bfloat16 gradients, in the norm."""
LOSS_TOLERANCE = 2**-8
"""Of the loss, as a share of the mean size of an advantage: a token's loss is of that size."""
_PEER_ROOM = 20.0
"""Seconds that a peer must find left."""


def run(request: Request, recorder: Recorder) -> None:
    """Measure every head and number of rows; ours first, then the peers."""
    from eapo_fast import recipes

    recipe = recipes.get("eapo")
    ceilings = measure_ceilings(request, recorder)
    heads = loss_work.SMALL_HEADS if request.small else loss_work.HEADS
    sizes = loss_work.SMALL_ROWS if request.small else loss_work.ROWS
    backends = [b for b in ("triton", "cuda", "auto") if _takes(b, request, recorder, recipe)]
    times: dict[tuple[str, int], float] = {}
    for head, (width, vocab) in heads.items():
        work = loss_work.build(sizes[-1], width, vocab, request.device, request.seed, recipe)
        for rows in sizes:
            for backend in backends:
                with recorder.guard(f"{head} head, {rows} rows, {backend}"):
                    found = _ours(work.slices(rows), head, backend, ceilings, request, recorder)
                    times[head, rows] = min(found, times.get((head, rows), found))
        with recorder.guard(f"{head} head, given logits", optional=True):
            _given_logits(work.slices(sizes[0]), head, ceilings, request, recorder)
        del work
        release(request.device)
    for head, (width, vocab) in heads.items():
        work = loss_work.build(sizes[-1], width, vocab, request.device, request.seed, recipe)
        for rows in sizes:
            _peers(work.slices(rows), head, times.get((head, rows)), request, recorder)
            release(request.device)


def _takes(backend: str, request: Request, recorder: Recorder, recipe: Any) -> bool:
    """Return whether a backend runs the fused loss here, and whether its values are right."""
    name = f"linear_policy_loss {backend}"
    if backend == "auto" and request.device == "cuda":
        from eapo_fast.kernels.linear_token_stats import REFUSALS

        sample = torch.zeros(1, 8, device="cuda", dtype=torch.bfloat16)
        if all(refusal(sample) is not None for refusal in REFUSALS.values()):
            recorder.skip(name, "it takes the reference here, which is not meant to be fast")
            return False
    with recorder.guard(name):
        return _values(backend, request, recorder, recipe)
    return False


def _values(backend: str, request: Request, recorder: Recorder, recipe: Any) -> bool:
    """Compare loss and gradients of 256 rows with float64."""
    heads = loss_work.SMALL_HEADS if request.small else loss_work.HEADS
    width, vocab = heads["0.5B"]
    rows = 32 if request.small else 256
    work = loss_work.build(rows, width, vocab, request.device, request.seed + 1, recipe)
    want = loss_work.ours(work, "reference", torch.float64)
    wanted = [_gradient(work.hidden).double(), _gradient(work.weight).double()]
    work.clear()
    try:
        got = loss_work.ours(work, backend)
    except ValueError as error:
        if str(error).startswith("backend:"):
            raise RefusedError(str(error)) from None
        raise
    errors = [
        float((_gradient(x).double() - w).norm() / w.norm())
        for x, w in zip((work.hidden, work.weight), wanted, strict=True)
    ]
    loss = float((got.double() - want).abs() / work.advantages.abs().mean())
    right = loss < LOSS_TOLERANCE and max(errors) < TOLERANCE
    recorder.check(
        f"values of linear_policy_loss {backend} at V = {vocab}", right,
        loss_error=loss, gradient_errors=errors,
    )  # fmt: skip
    return right


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _ours(
    work: Work, head: str, backend: str, ceilings: Ceilings, request: Request, recorder: Recorder
) -> float:
    """Time one shape: all rows active, then a part; returns milliseconds."""
    rows, device = len(work.hidden), request.device
    name = f"linear loss, {head} head, {rows} rows, {backend}"
    repeats = 1 if request.small else 7

    def step(of: Work) -> Callable[[], Tensor]:
        def run_once() -> Tensor:
            of.clear()
            return loss_work.ours(of, backend)

        return run_once

    extra = _extra_memory(step(work), work, device)
    spent = milliseconds(step(work), device, repeats=repeats, warmup=0 if request.small else 2)
    floor = 3 * work.product / ceilings.gemm * 1e3
    limit = BARS.get((head, rows))
    recorder.figure(name, spent, "ms", Bar("<=", limit, "H200") if limit else None, floor_ms=floor)
    recorder.figure(f"{name}: share of three products", floor / spent, "")
    if extra is not None:
        allowed = 4.0 * (SLAB_ROWS * len(work.weight) + work.weight.numel())
        bar = Bar("<=", MEMORY_ROOM)
        recorder.figure(
            f"{name}: extra memory / (slab + fp32 gradient)", extra / allowed, "", bar, bytes=extra
        )
    part = loss_work.partly_active(work, request.seed)
    active = float(part.mask.double().mean()) if part.mask is not None else 1.0
    moving = 1 - round(0.3 * len(part.advantages)) / len(part.advantages)
    share = active * (1 + 2 * moving) / 3  # one product of all active rows, two of those that move
    partly = milliseconds(step(part), device, repeats=repeats, warmup=0 if request.small else 1)
    recorder.figure(
        f"{name}: {active:.0%} active, time / share of work",
        partly / spent / share,
        "",
        Bar("<=", ACTIVE_ROOM),
        ms=partly,
        share_of_work=share,
    )
    work.clear()
    return spent


def _extra_memory(step: Callable[[], object], work: Work, device: str) -> float | None:
    """Return the peak of a step above what was there and above the gradients that it returns."""
    step()  # compiles
    if device == "cpu":
        return None
    work.clear()
    release(device)
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    returned = sum(_gradient(x).nbytes for x in (work.hidden, work.weight))
    return float(torch.cuda.max_memory_allocated() - before - returned)


def _given_logits(
    work: Work, head: str, ceilings: Ceilings, request: Request, recorder: Recorder
) -> None:
    """Time the launch from a slab of float32 logits to their gradients, read and written once."""
    from eapo_fast import ops
    from eapo_fast.kernels.linear_policy_loss.triton_plan import program_of
    from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead

    rows = min(SLAB_ROWS, len(work.hidden)) // work.length * work.length
    work = work.slices(rows)
    edges = torch.arange(len(work.advantages) + 1, device=work.hidden.device) * work.length
    batch = ops.PolicyBatch(
        old_logprob=work.old_logprob, advantages=work.advantages, cu_seqlens=edges
    )
    head_of: Any = TritonHead(
        work.hidden.detach(),
        work.weight.detach(),
        work.targets,
        bias=None,
        temperature=1.0,
        softcap=None,
        vocab_size=len(work.weight),
        banned=None,
        chunk_size=rows,
        wanted=(True, True, False),
    )
    program = program_of(batch, work.recipe)
    span = head_of.span(0, rows)
    head_of.read_span(span, program=program)
    want = loss_work.exact_logprobs(work.hidden.float(), work.weight.float(), work.targets)
    error = float((head_of.logprob - want).abs().max())
    recorder.check(f"log-probabilities over given logits, {head} head", error < 1e-3, error=error)

    def launch() -> None:
        head_of._run(span, program=program, STATISTICS=True, POWERS=False, GRADIENT=True)

    repeats = 1 if request.small else 10
    spent = milliseconds(launch, request.device, repeats=repeats, warmup=1)
    moved = 8.0 * rows * len(work.weight)
    name = f"loss over {rows} rows of float32 logits, {head} head"
    recorder.figure(name, spent, "ms")
    recorder.figure(
        f"{name}: share of copy", moved / (spent / 1e3) / ceilings.copy, "", Bar(">=", COPY_SHARE)
    )


def _peers(work: Work, head: str, own: float | None, request: Request, recorder: Recorder) -> None:
    """Time what a user would pick instead; each one's loss must be near the eager one's first."""
    rows = len(work.hidden)
    want = float(_eager_by_chunks(work))
    peers: dict[str, Callable[[Work], Tensor]] = {}
    if find_spec("liger_kernel"):
        peers |= {"Liger chunked": loss_work.liger_chunked, "Liger Triton": loss_work.liger_triton}
    peers["eager torch"] = _eager
    if not request.small:
        peers["torch.compile"] = _compiled()
    for peer, call in peers.items():
        name = f"{peer}, {head} head, {rows} rows"
        if request.remaining() < (_PEER_ROOM if peer == "torch.compile" else 6):
            recorder.skip(name, "the time box is used up")
            continue
        with recorder.guard(name, optional=True):
            _peer(name, peer, call, work, want, own, request, recorder)
        work.clear()
        release(request.device)


def _peer(
    name: str,
    peer: str,
    call: Callable[[Work], Tensor],
    work: Work,
    want: float,
    own: float | None,
    request: Request,
    recorder: Recorder,
) -> None:
    def step() -> Tensor:
        work.clear()
        return call(work)

    loss = float(step())
    if not abs(loss - want) <= 0.02 * max(abs(want), 0.05):
        raise RuntimeError(f"its loss is {loss:.5f}, plain torch's {want:.5f}: nothing was timed")
    spent = milliseconds(step, request.device, repeats=3, warmup=1)
    recorder.figure(name, spent, "ms", loss=loss)
    if own is not None:
        bar = Bar(">=", AGAINST_LIGER) if peer.startswith("Liger") else None
        recorder.figure(f"{name}: times ours", spent / own, "x", bar)


def _eager(work: Work) -> Tensor:
    loss = loss_work.eager_loss(*loss_work.eager_arguments(work))
    loss.backward()
    return loss.detach()


def _compiled() -> Callable[[Work], Tensor]:
    compiled = torch.compile(loss_work.eager_loss, dynamic=False)

    def call(work: Work) -> Tensor:
        loss = compiled(*loss_work.eager_arguments(work))
        loss.backward()
        return loss.detach()

    return call


@torch.no_grad()
def _eager_by_chunks(work: Work) -> Tensor:
    """Return the eager loss without ever holding the logits of all rows."""
    hidden, weight, targets, *rest = loss_work.eager_arguments(work)
    return loss_work.clipped_loss(loss_work.exact_logprobs(hidden, weight, targets), *rest)
