"""Where the checks of this folder run: `EAPO_CHECK` is "triton" or "cuda".

On the GPU if there is one; else Triton runs in its interpreter (TRITON_INTERPRET=1 is up to the
caller) and CUDA in the emulator of `cuda_emulator/`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

BACKEND = os.environ.get("EAPO_CHECK", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put the emulated kernels in the place of the CUDA module."""
    if BACKEND != "cuda" or DEVICE == "cuda":
        yield
        return
    import emulated_cuda

    import eapo_fast
    from eapo_fast.kernels import kv_write, native, paged_attention, sample
    from eapo_fast.kernels.linear_token_stats import cuda_rows

    module = emulated_cuda.load(Path(request.config.cache.mkdir("cuda_emulator")))
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "eapo_fast._cuda", module)
    patch.setattr(eapo_fast, "_cuda", module, raising=False)
    for user in (native, kv_write, paged_attention, sample, cuda_rows):
        patch.setattr(user, "cuda_refusal", lambda tensor, dtypes=(): None)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def alive() -> Iterator[None]:
    """Wait for the GPU behind every test, so that an error is that of the test that made it.

    A GPU that faulted serves a process no more: pytest-xdist starts another in its place.
    """
    yield
    if DEVICE != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(f"the GPU faulted: {error}", file=sys.stderr, flush=True)
        os._exit(3)


@pytest.fixture
def backend() -> str:
    """The backend to check."""
    return BACKEND


@pytest.fixture
def device() -> torch.device:
    """The device whose tensors it takes here."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, or a number that is far out: nobody may read it."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(10**9))

    fill: Callable[..., torch.Tensor] = poison
    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, backend: str) -> int:
    """Keys of a split of paged attention: few on the CPU, where the time goes with the keys."""
    if backend == "triton":
        from eapo_fast.kernels.paged_attention import triton_kernel as kernel
    else:
        from eapo_fast.kernels.paged_attention import cuda_kernel as kernel
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "SPLIT", 64)
    return int(kernel.SPLIT)
