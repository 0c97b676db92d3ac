"""What a worker process does: lock itself down, answer one request, end."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from sympy import Basic

from eapo_fast.rewards import verdict
from eapo_fast.rewards.limits import CPU_SECONDS, MAX_CALLS
from eapo_fast.rewards.scalars import Outcome
from eapo_fast.rewards.symbolic import STOPPED
from eapo_fast.rewards.symbolic.decide import compare_symbolically

_MEMORY = 1 << 30
_REQUEST_BYTES = 1 << 16
_LATE_MODULES = (
    "assumptions.wrapper",
    "concrete.delta",
    "integrals.heurisch",
    "integrals.manualintegrate",
    "integrals.prde",
    "integrals.risch",
    "polys.domains.old_fractionfield",
    "polys.domains.old_polynomialring",
    "polys.polymatrix",
    "sets.handlers.functions",
    "sets.handlers.issubset",
    "sets.setexpr",
)
"""What sympy imports at first use, which a worker cannot."""
_NEVER_BUILT = ("sympy.physics.units", "sympy.tensor.tensor")
"""Modules whose classes sympy loads only to ask whether a value is one of them. No answer builds
them, so empty ones stand in: loading the real ones is a fifth of the start."""
_WARM_UP = (
    (r"\sum_{k=1}^{n} k^2", r"\frac{n(n+1)(2n+1)}{6}"),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", "1"),
    ("x^2-y^2=0", "y=1/x"),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}+\begin{pmatrix}1&0\\0&1\end{pmatrix}", "2"),
)


_STOPPED = Outcome(None, STOPPED)


class _StandIn(ModuleType):
    """A module of empty classes, made as they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Basic,), {})
        setattr(self, name, made)
        return made


def warm_up() -> None:
    """Import what comparisons need and run a few."""
    for name in _NEVER_BUILT:
        sys.modules.setdefault(name, _StandIn(name))
    for name in _LATE_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"sympy.{name}")
    for prediction, reference in _WARM_UP:
        decide(prediction, reference)
    gc.freeze()  # a collection in a worker would copy every page that it shares with the template


def decide(prediction: str, reference: str) -> Outcome:
    """Compare two answers with computer algebra where the other tiers do not decide."""
    return verdict.compare_texts(prediction, reference, compare_symbolically)


def serve_once(descriptor: int) -> None:
    """Say hello, read one request, answer it."""
    channel = socket.socket(fileno=descriptor)
    lock_down()
    channel.sendall(_line({"pid": os.getpid()}))
    request = b""
    while not request.endswith(b"\n"):
        part = channel.recv(_REQUEST_BYTES)
        if not part:
            return
        request += part
    sys.settrace(_limit(channel))
    reply = answer(json.loads(request))
    sys.settrace(None)
    channel.sendall(_line(reply))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to one request: `equal` (true, false or null) and `reason`."""
    try:
        outcome = decide(request["prediction"], request["reference"])
    except (MemoryError, RecursionError):
        outcome = _STOPPED
    return {"equal": outcome.equal, "reason": outcome.reason}


def _limit(channel: socket.socket) -> Callable[[FrameType, str, Any], None]:
    """Return a trace function that counts calls and ends the process at the limit.

    An exception would not do: one that is raised while a generator is closed gets lost.
    """
    left = MAX_CALLS

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            channel.sendall(_line({"equal": _STOPPED.equal, "reason": _STOPPED.reason}))
            os._exit(0)

    return count


def lock_down() -> None:
    """Give up, for good, what a comparison has no use for.

    No file or connection can be opened, nothing written to disk, no source text compiled; memory
    and CPU time are bounded by the kernel.
    """
    for limit, value in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _MEMORY),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    sys.addaudithook(_refuse)


_REFUSED = frozenset(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"))
_MONOMIAL_CODE = re.compile(rb"def monomial_[a-z]+\([A-Za-z, ]*\):[\w\s(),:=+*<>-]*")
"""Arithmetic on exponents that sympy generates from the number of variables alone."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "compile":
        source = arguments[0]
        refused = not (isinstance(source, bytes) and _MONOMIAL_CODE.fullmatch(source))
    else:
        refused = event in _REFUSED
    if refused:
        raise PermissionError(f"{event} is not allowed in a symbolic worker")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
