"""What ran on a GPU while a program went on: kernel time, gaps by length, the longest kernels.

Gaps say what the GPU waited for: up to some 10 us for the next launch, up to a millisecond for the
host between two decode steps, longer for phases of the host alone or for experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpu_check.records import Recorder

GAPS = (1e-5, 1e-4, 1e-3, 1e-2, float("inf"))
"""Classes of gaps: up to so many seconds."""
_NAMED = 24
"""Kernels that are named."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Trace:
    """What ran on the device; seconds."""

    busy: float
    """Time in which a kernel or a copy ran."""
    gaps: tuple[float, ...]
    """Time between them, by the classes of `GAPS`."""
    launches: int
    longest: tuple[tuple[str, float, int], ...]
    """Kernels that took longest in sum: name, seconds, launches."""


def started() -> Any:
    """Return a profiler that runs; not every machine lets a program trace its kernels."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.__enter__()
    return profiler


def ended(profiler: Any) -> Trace:
    """End a profiler; returns what ran on the GPU. Raises `RuntimeError` if it saw nothing."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    profiler.__exit__(None, None, None)
    return read(profiler, DeviceType.CUDA)


def read(profiler: Any, device: Any) -> Trace:
    """Return what ran on a device, annotations left out.

    From the raw events of the trace: a training step has up to a million.
    """
    spans: list[Span] = []
    seconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != device:
            continue
        if getattr(event, "is_user_annotation", lambda: False)():
            continue
        start, spent = event.start_ns(), event.duration_ns()
        spans.append((start, start + spent))
        name = event.name()
        seconds[name] += spent / 1e9
        launches[name] += 1
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    busy, gaps = covered(spans)
    longest = tuple((n[:120], s, launches[n]) for n, s in seconds.most_common(_NAMED))
    return Trace(busy / 1e9, tuple(g / 1e9 for g in gaps), len(spans), longest)


def covered(spans: Iterable[Span]) -> tuple[float, list[float]]:
    """Return the length of the union of intervals in ns, and that of its gaps by `GAPS`."""
    total, reached, gaps = 0.0, float("-inf"), [0.0] * len(GAPS)
    for start, end in sorted(spans):
        gap = start - reached
        if 0 < gap < float("inf"):
            gaps[next(i for i, most in enumerate(GAPS) if gap / 1e9 <= most)] += gap
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total, gaps


def write(found: Trace, wall: float, recorder: Recorder) -> None:
    """Write down a trace of `wall` seconds."""
    recorder.figure(
        "idle share of the GPU, while traced", 1 - found.busy / wall, "", launches=found.launches
    )
    low = 0.0
    for most, spent in zip(GAPS, found.gaps, strict=True):
        name = f"over {_length(low)}" if most == float("inf") else f"up to {_length(most)}"
        recorder.figure(f"idle while traced, in gaps {name}", spent / wall, "")
        low = most
    recorder.note(
        "longest kernels",
        kernels=[{"name": n, "s": round(s, 4), "launches": c} for n, s, c in found.longest],
    )


def _length(seconds: float) -> str:
    return f"{1e3 * seconds:g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:g} us"
