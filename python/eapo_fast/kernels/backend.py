"""Which implementation of an op runs: chosen by device, or named and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eapo_fast.errors import suggest

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "flash")

Refusal = Callable[..., str | None]
"""Takes the op's deciding tensors; returns why the backend cannot run them, or None."""


def choose_backend(
    op: str,
    backend: str,
    refusals: Mapping[str, Refusal],
    *tensors: Any,
    on_request: Mapping[str, Refusal] | None = None,
) -> str:
    """Return the name of the backend to use for `tensors`.

    `refusals` lists what the op has, fastest first; "reference", which refuses nothing, may be left
    out. "auto" takes the first that does not refuse; those in `on_request`, which have not been
    proven on their device, run only when they are named. Raises `ValueError` for an unknown name,
    for a backend the op does not have, and, with the reason, for one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: got {backend!r}, allowed is one of {', '.join(BACKENDS)}."
            f"{suggest(str(backend), BACKENDS)}"
        )
    if backend == "reference":
        return backend
    if backend == "auto":
        return next((b for b in refusals if refusals[b](*tensors) is None), "reference")
    refusals = {**refusals, **(on_request or {})}
    if backend not in refusals:
        has = ", ".join(("auto", *refusals, "reference"))
        raise ValueError(f"backend: {op} has no {backend!r} implementation; it has {has}")
    reason = refusals[backend](*tensors)
    if reason is not None:
        raise ValueError(f"backend: {op} cannot run on {backend!r} here: {reason}")
    return backend
