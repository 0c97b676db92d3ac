"""Time on a device, and the ceilings that shares refer to: copy bandwidth and GEMM rate."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gpu_check.records import Recorder, Request


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured in this process."""

    copy: float
    """Bytes a second of a large copy, reads and writes counted."""
    gemm: float
    """Flop a second of a large bfloat16 product."""


def milliseconds(
    work: Callable[[], object], device: str, *, repeats: int = 10, warmup: int = 3
) -> float:
    """Return the median time of a call: device events on a GPU, the wall clock on a CPU."""
    for _ in range(warmup):
        work()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def replayed(work: Callable[[], object], device: str) -> Callable[[], object]:
    """Return `work` as a captured graph on a GPU, so that launches cost nothing; else itself."""
    if device == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure_ceilings(request: Request, recorder: Recorder) -> Ceilings:
    """Measure both ceilings on random data, and write them down."""
    device = request.device
    count, size = (1 << 22, 256) if request.small else (1 << 30, 8192)
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 4 * count / milliseconds(partial(target.copy_, source), device) * 1e3
    if not torch.equal(source, target):
        raise RuntimeError("a device copy did not copy")
    del source, target
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    gemm = 2 * size**3 / milliseconds(lambda: a @ b, device) * 1e3
    recorder.figure("copy bandwidth", round(copy / 1e12, 4), "TB/s")
    recorder.figure("bfloat16 GEMM", round(gemm / 1e12, 3), "TFLOP/s")
    return Ceilings(copy, gemm)


def release(device: str) -> None:
    """Give cached memory back, so that a peer finds all of it."""
    gc.collect()  # cycles may hold tensors
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
