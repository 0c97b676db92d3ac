"""Stage 5: losses behind an LM head and over given logits, against peers and floors.

Values first: loss and gradients of some rows against float64 before any time is taken, and each
peer's loss against ours. Floors are three matrix products at the rate of a large bfloat16 product,
and bytes at the bandwidth of a large copy, both measured in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
SIDES = {
    "cuda": ("cuda", False),
    "cuda, rows in CUDA": ("cuda", True),
    "triton": ("triton", False),
    "auto": ("auto", False),
}
"""Our ways: backend, and whether the CUDA kernel takes the rows. On a GPU "auto" is the first."""
SHAPES = ((4096, 8, 1), (4096, 8, 3), (8192, 16, 3), (8192, 32, 4), (16_384, 32, 2))
"""Columns at once, warps and stages of the Triton rows, to be chosen from."""
GIVEN_ROWS = 16_384
"""Rows of given logits: beside them the op's small launches do not count."""
TOLERANCE = 2**-7
"""Of bfloat16 gradients, in the norm."""
LOSS_TOLERANCE = 2**-8
"""Of the loss, as a share of the mean size of an advantage: a token's loss is of that size."""
_PEER_ROOM = 20.0
"""Seconds that a peer must find left."""


def run(request: Request, recorder: Recorder) -> None:
    """Measure every head and number of rows; ours first, then the peers.

    Our own CUDA kernel has a process of its own (option "rows": "cuda"): one that faults takes the
    device from whatever comes after it.
    """
    from eapo_fast import recipes

    in_cuda = request.options.get("rows") == "cuda"
    recipe = recipes.get("eapo")
    ceilings = measure_ceilings(request, recorder)
    heads = loss_work.SMALL_HEADS if request.small else loss_work.HEADS
    sizes = loss_work.SMALL_ROWS if request.small else loss_work.ROWS
    sides = [s for s in SIDES if SIDES[s][1] == in_cuda]
    sides = [s for s in sides if s != "auto" or request.device == "cpu"]
    sides = [side for side in sides if _takes(side, request, recorder, recipe)]
    times: dict[tuple[str, int], float] = {}
    for head, (width, vocab) in heads.items():
        work = loss_work.build(sizes[-1], width, vocab, request.device, request.seed, recipe)
        for rows in reversed(sizes):
            for side in sides:
                with recorder.guard(f"{head} head, {rows} rows, {side}"):
                    found = _ours(work.slices(rows), head, side, ceilings, request, recorder)
                    times[head, rows] = min(found, times.get((head, rows), found))
        del work
        release(request.device)
    for head, (_, vocab) in heads.items():
        with recorder.guard(f"given logits of the {head} head", optional=True):
            _given_logits(head, vocab, ceilings, request, recorder)
        release(request.device)
    for head, (width, vocab) in () if in_cuda else heads.items():
        work = loss_work.build(sizes[-1], width, vocab, request.device, request.seed, recipe)
        for rows in sizes:
            _peers(work.slices(rows), head, times.get((head, rows)), request, recorder)
            release(request.device)


@contextmanager
def _rows_of(side: str) -> Iterator[str]:
    """Let the CUDA kernel take the rows or not; yields the backend."""
    from eapo_fast.kernels.linear_token_stats import library_head

    backend, library_head.ROWS_IN_CUDA = SIDES[side]
    try:
        yield backend
    finally:
        library_head.ROWS_IN_CUDA = False


def _takes(side: str, request: Request, recorder: Recorder, recipe: Any) -> bool:
    """Return whether one of our ways runs here, and whether its values are right."""
    name = f"linear_policy_loss, {side}"
    if SIDES[side][1] and not _has_cuda_rows(request):
        recorder.skip(name, "the CUDA module was not built, or this is no CUDA device")
        return False
    with recorder.guard(name), _rows_of(side) as backend:
        return _values(side, backend, request, recorder, recipe)
    return False


def _has_cuda_rows(request: Request) -> bool:
    if request.device != "cuda":
        return False
    from eapo_fast.kernels.linear_token_stats import cuda_rows

    return cuda_rows.refusal(torch.zeros(1, 8, device="cuda")) is None


def _values(side: str, backend: str, request: Request, recorder: Recorder, recipe: Any) -> bool:
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
        f"values of linear_policy_loss, {side}, at V = {vocab}", right,
        loss_error=loss, gradient_errors=errors,
    )  # fmt: skip
    return right


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _ours(
    work: Work, head: str, side: str, ceilings: Ceilings, request: Request, recorder: Recorder
) -> float:
    """Time one shape: all rows active, then a part; returns milliseconds."""
    rows, device = len(work.hidden), request.device
    name = f"linear loss, {head} head, {rows} rows, {side}"
    repeats = 1 if request.small else 7

    def step(of: Work) -> Callable[[], Tensor]:
        def run_once() -> Tensor:
            of.clear()
            with _rows_of(side) as backend:
                return loss_work.ours(of, backend)

        return run_once

    extra = _extra_memory(step(work), work, device)
    spent = milliseconds(step(work), device, repeats=repeats, warmup=0 if request.small else 2)
    floor = 3 * work.product / ceilings.gemm * 1e3
    limit = None if side == "triton" else BARS.get((head, rows))
    recorder.figure(name, spent, "ms", Bar("<=", limit, "H200") if limit else None, floor_ms=floor)
    recorder.figure(f"{name}: share of three products", floor / spent, "")
    if extra is not None:
        allowed = _slab_bytes(work, side) + 4.0 * work.weight.numel()
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
    returned = _gradient(work.hidden).nbytes  # the weight's comes when the slab is gone
    return float(torch.cuda.max_memory_allocated() - before - returned)


def _slab_bytes(work: Work, side: str) -> float:
    """Return the size of the largest slab of float32 logits that one of our ways makes."""
    from eapo_fast.kernels.linear_token_stats.coefficients import spans
    from eapo_fast.kernels.linear_token_stats.library_head import LibraryHead
    from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead

    library = SIDES[side][0] != "triton"
    head = (LibraryHead if library else TritonHead)(
        work.hidden.detach(), work.weight.detach(), work.targets, bias=None, temperature=1.0,
        softcap=None, vocab_size=len(work.weight), banned=None, chunk_size=None,
    )  # fmt: skip
    rows = head.slab_rows(keep=True)  # the library's head makes it once, for the longest span
    if not library:
        rows = max(stop - start for start, stop in spans(len(work.hidden), rows, even=True))
    return 4.0 * rows * len(work.weight)


def _given_logits(
    head: str, vocab: int, ceilings: Ceilings, request: Request, recorder: Recorder
) -> None:
    """Time the loss over given logits and its gradient in their place, read and written once."""
    from eapo_fast.kernels.linear_token_stats import triton_row_pass

    rows = 16 if request.small else GIVEN_ROWS
    usual = dict(triton_row_pass.SHAPES)
    for dtype in (torch.bfloat16, torch.float32):
        logits, ask = _given(rows, vocab, dtype, request)
        for backend in (request.options.get("rows", "triton"),):
            shapes = SHAPES if backend == "triton" else ((0, 0, 0),)
            for shape in shapes[:1] if request.small else shapes:
                how = f"{backend} {shape}" if shape[0] else backend
                kind = str(dtype).removeprefix("torch.")
                name = f"loss over {rows} rows of {kind} logits, {head} head, {how}"
                if shape[0]:
                    width = logits.element_size()
                    triton_row_pass.SHAPES[width] = triton_row_pass.Shape(*shape)
                try:
                    with recorder.guard(name, optional=True):
                        barred = not shape[0] or shape == usual[logits.element_size()]
                        _time_given(name, logits, ask, backend, ceilings, request, recorder,
                                    barred=barred)  # fmt: skip
                finally:
                    triton_row_pass.SHAPES.update(usual)


def _given(
    rows: int, vocab: int, dtype: torch.dtype, request: Request
) -> tuple[Tensor, dict[str, Any]]:
    """Return random logits, and what a loss over them asks for beside them."""
    from eapo_fast import ops, recipes

    generator = torch.Generator(request.device).manual_seed(request.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=request.device)

    logits = (normal(rows, vocab) * 2).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator, device=request.device)
    edges = torch.arange(9, device=request.device) * (rows // 8)
    own = torch.cat([
        part.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for part, ids in zip(logits.split(512), targets.split(512), strict=True)
    ])  # fmt: skip
    batch = ops.PolicyBatch(
        old_logprob=own + 0.02 * normal(rows), advantages=normal(8).sign(), cu_seqlens=edges
    )
    return logits, {"targets": targets, "batch": batch, "recipe": recipes.get("eapo")}


def _time_given(
    name: str,
    logits: Tensor,
    ask: dict[str, Any],
    backend: str,
    ceilings: Ceilings,
    request: Request,
    recorder: Recorder,
    *,
    barred: bool,
) -> None:
    """Check some rows, then time all of them; what is timed starts from the gradient before."""
    from eapo_fast import ops

    few = slice(0, min(512, len(logits) // 8))
    own = ask["batch"]
    part = ops.PolicyBatch(
        old_logprob=own.old_logprob[few],
        advantages=own.advantages[:1],
        cu_seqlens=torch.tensor([0, few.stop], device=logits.device),
    )
    found = []
    for how, dtype in (("reference", torch.float64), (backend, logits.dtype)):
        leaf = logits[few].to(dtype).requires_grad_()
        try:
            loss = ops.logits_policy_loss(
                leaf, ask["targets"][few], part, ask["recipe"], backend=how
            ).loss
        except ValueError as error:
            if str(error).startswith("backend:"):
                raise RefusedError(str(error)) from None
            raise
        found.append((loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()))
        del leaf, loss
    (want, wanted), (got, gradient) = found
    error = float((gradient - wanted).norm() / wanted.norm())
    right = abs(float(got - want)) < LOSS_TOLERANCE and error < TOLERANCE
    recorder.check(f"values: {name}", right, gradient_error=error)
    del found, wanted, gradient
    if not right:
        return
    room = logits.clone().requires_grad_() * 1  # no leaf
    level = torch.full_like(own.old_logprob, -math.log(logits.shape[1]))
    ask = ask | {"batch": replace(own, old_logprob=level)}  # a pass leaves what is nearly uniform

    def launch() -> None:
        loss = ops.logits_policy_loss(room, **ask, in_place=True, backend=backend).loss
        torch.autograd.grad(loss, room)

    spent = milliseconds(launch, request.device, repeats=1 if request.small else 10, warmup=2)
    moved = 2.0 * logits.numel() * logits.element_size()
    recorder.figure(name, spent, "ms")
    bar = Bar(">=", COPY_SHARE) if barred else None
    recorder.figure(f"{name}: share of copy", moved / (spent / 1e3) / ceilings.copy, "", bar)


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
