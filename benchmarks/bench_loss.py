"""The LM-head loss, forward and backward, against its peers and its floor; one command.

    python benchmarks/bench_loss.py [--sizes small large] [--dtypes float32 bfloat16]
        [--sides cpu eager ...] [--threads 2] [--repeats 5] [--json FILE]

Runs on the GPU if there is one. Values first: loss and gradients of every side must agree with the
reference (float32: 1e-4 of the norm; bfloat16: 2**-5, the rounding of the naive logits) before its
time is printed. "bare" are the matrix products of the plan that runs, cut as it cuts them, with the
addition of the slabs' weight gradients: the floor (on a GPU by cuBLAS). "flop" are those of three
products (four for what computes its logits twice), "bytes" the logits that are read and written and
the weight and its gradient, "extra" the peak memory of a run over its inputs and gradients. Sides
take turns, the best of the repeats counts. A side that cannot run here says why.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_sides import (
    SIDES,
    Case,
    active_share,
    check,
    extra_memory,
    gradients,
    sides_of,
    timed,
    work,
)

from eapo_fast import _core

SIZES = {
    "tiny": (64, 32, 500),
    "small": (4096, 256, 4096),
    "large": (1024, 896, 151_936),
    "0.5B": (32_768, 896, 151_936),
    "7B": (32_768, 3584, 152_064),
}
"""Rows, width and vocabulary; the last two are for a GPU."""


def seconds(run: Callable[[], object]) -> float:
    """Return how long a run takes, on the device too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def checked(case: Case, sides: list[str]) -> dict[str, Callable[[], object]]:
    """Compare every side with the reference; return those whose time is to be taken."""
    known = sides_of(case)
    want = tuple(x.clone() for x in gradients(case, lambda: case.ours("reference")))
    masked = tuple(x.clone() for x in gradients(case, lambda: case.ours("reference", masked=True)))
    runs: dict[str, Callable[[], object]] = {}
    for name in sides:
        if name == "bare":
            runs[name] = case.bare
            continue
        loss = known[name]
        if isinstance(loss, str):
            print(f"  {name:18} -- {loss}")
            continue
        try:
            got = gradients(case, loss)
        except (torch.OutOfMemoryError, ImportError, NotImplementedError) as error:
            print(f"  {name:18} -- {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        check(name, got, masked if "active" in name else want)
        del got
        if timed(case, name):
            runs[name] = lambda loss=loss: gradients(case, loss)
        else:
            print(f"  {name:18} -- values agree (interpreted: its time means nothing)")
    return runs


def measure(case: Case, sides: list[str], repeats: int) -> list[dict[str, Any]]:
    """Check and time every side; print and return the lines."""
    runs = checked(case, sides)
    extra = {name: extra_memory(case, run) for name, run in runs.items()}
    times: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] = min(times.get(name, float("inf")), seconds(run))
    lines = []
    for name, best in sorted(times.items(), key=lambda item: item[1]):
        flop, moved = work(case, name)
        floor = times.get("bare", float("nan")) * active_share(name)
        ratio = times.get("eager", float("nan")) / best
        lines.append({"side": name, "ms": best * 1e3, "flop": flop, "bytes": moved,
                      "extra_bytes": extra[name], "share_of_floor": floor / best,
                      "times_eager": ratio})  # fmt: skip
        print(
            f"  {name:18} {best * 1e3:9.2f} ms  {flop / 1e9:9.4g} Gflop {flop / best / 1e12:6.2f} "
            f"TFLOP/s {moved / 1e6:8.4g} MB moved {extra[name] / 1e6:8.4g} MB extra "
            f"{floor / best:5.0%} of the floor {ratio:6.2f}x eager"
        )
    return lines


def main() -> None:
    """Measure every size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    gpu = torch.cuda.is_available()
    usual = ["small", "large", "0.5B", "7B"] if gpu else ["small", "large"]
    parser.add_argument("--sizes", nargs="*", default=usual, choices=SIZES)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _core.set_num_threads(options.threads)
    device = "cuda" if gpu else "cpu"
    load = os.getloadavg()[0]
    name = torch.cuda.get_device_name() if gpu else _core.isa()
    print(f"{device}, {name}, {options.threads} threads, torch {torch.__version__}, "
          f"load {load:.1f}")  # fmt: skip
    results: dict[str, Any] = {"isa": _core.isa(), "threads": options.threads, "load": load}
    results["device"] = name
    for size in options.sizes:
        for dtype in options.dtypes:
            print(f"{size} {SIZES[size]} {dtype}")
            case = Case(*SIZES[size], getattr(torch, dtype), device)
            results[f"{size} {dtype}"] = measure(case, options.sides, options.repeats)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
