"""Stage 2: every op of a GPU backend against float64, on fresh random inputs and odd sizes.

Outputs are poisoned: new memory holds NaN, or a number that is far out, so that what nobody wrote
shows. Errors are those of the results' norms; a bound of 1e-4 in float32 is a third of what tf32
products would leave. What a backend refuses is skipped, with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_check.records import Recorder, RefusedError, Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Trial:
    """One op on one backend and dtype, with its own source of random numbers."""

    backend: str
    device: str
    dtype: torch.dtype
    small: bool
    random: random.Random
    generator: torch.Generator
    worst: float = 0.0
    """Largest error so far, as a share of its bound."""
    where: str = ""
    cases: int = 0
    failures: list[str] = field(default_factory=list)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return random numbers of the dtype, on the CPU."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return random int64 numbers below `high`."""
        return torch.randint(high, shape, generator=self.generator)

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `op` on the backend; what it refuses raises `RefusedError`."""
        try:
            return op(*args, **kwargs, backend=self.backend)
        except ValueError as error:
            if str(error).startswith("backend:"):
                raise RefusedError(str(error)) from None
            raise

    def compare(
        self, what: str, got: Tensor, want: Tensor, bound: float, *, floor: float = 1e-2
    ) -> None:
        """Take in the error of one result: the norm of the difference over that of the result.

        A norm below `floor` counts as `floor`: what cancels keeps the rounding of its terms.
        """
        difference = (got.detach().cpu().double() - want.detach().cpu().double()).norm()
        size = float(want.detach().double().norm())
        self.take(what, float(difference) / (bound * max(size, floor)))

    def take(self, what: str, share: float) -> None:
        """Take in an error as a share of its bound."""
        self.cases += 1
        if not share <= self.worst:
            self.worst, self.where = share, what
        if not share <= 1:
            self.failures.append(f"{what}: {share:.3g} times its bound")


def run(request: Request, recorder: Recorder) -> None:
    """Check the backend of the request's options; of them, "dtype" and "ops" pick a part."""
    from gpu_check import loss_cases, sampler_cases

    backend = request.options["backend"]
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = {**sampler_cases.CASES, **loss_cases.CASES}
    if "ops" in request.options:
        cases = {name: cases[name] for name in request.options["ops"].split()}
    with poisoned():
        for name, case in cases.items():
            _check_op(name, case, backend, request, recorder)
    if backend == "triton" and request.device == "cuda" and find_spec("flash_attn"):
        _check_op("paged_attention", cases["paged_attention"], "flash", request, recorder)


def _check_op(
    name: str,
    case: Callable[[Trial], None],
    backend: str,
    request: Request,
    recorder: Recorder,
) -> None:
    """Check one op in the dtypes asked for; one record each."""
    only = request.options.get("dtype")
    for dtype in DTYPES[:2] if request.small else DTYPES:
        if only is not None and only != str(dtype).removeprefix("torch."):
            continue
        short = str(dtype).removeprefix("torch.")
        label = f"{name} {backend} {short}"
        if request.remaining() < 3:
            recorder.skip(label, "the time box is used up")
            continue
        seed = f"{request.seed} {name} {short}"
        trial = Trial(
            backend,
            request.device,
            dtype,
            request.small,
            random.Random(seed),
            torch.Generator().manual_seed(random.Random(seed).randrange(2**31)),
        )
        with recorder.guard(label):
            case(trial)
            recorder.check(
                label,
                trial.cases > 0 and not trial.failures,
                cases=trial.cases,
                worst_share_of_bound=round(trial.worst, 4),
                where=trial.where,
                failures=trial.failures[:8],
            )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, or with a number that is far out."""
    originals = torch.empty, torch.empty_like, Tensor.new_empty

    def spoil(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            if tensor.dtype == torch.bool or tensor.dtype == torch.uint8:
                return tensor.fill_(1)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -99)

        return poison

    torch.empty, torch.empty_like = spoil(originals[0]), spoil(originals[1])  # type: ignore[assignment]
    Tensor.new_empty = spoil(originals[2])  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals[:2]  # type: ignore[assignment]
        Tensor.new_empty = originals[2]  # type: ignore[method-assign]


def to_device(value: Any, device: str) -> Any:
    """Return a copy of tensors, in tuples and dicts too, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(to_device(v, device) for v in value)
    return value


def widened(value: Any) -> Any:
    """Return floating-point tensors, in dicts too, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    return value
