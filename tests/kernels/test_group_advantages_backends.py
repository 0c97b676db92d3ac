"""The CPU, Triton (interpreted) and CUDA kernels of group_advantages against the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from advantage_cases import cases

from eapo_fast import _core
from eapo_fast.kernels.group_advantages import reference
from eapo_fast.ops import group_advantages

INTERPRETED = """
import torch
from advantage_cases import cases
from eapo_fast.kernels.group_advantages import reference
from eapo_fast.ops import group_advantages
every = list(cases())
for rewards, groups, options in every[::5] + [case for case in every if not case[2]["eps"]]:
    want = reference.group_advantages(rewards.double(), groups, **options)
    got = group_advantages(rewards, groups, **options, backend="triton")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
print("agreed")
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_native_kernels_match_float64_reference(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = _core if device == "cpu" else pytest.importorskip("eapo_fast._cuda")
    for rewards, groups, options in cases():
        want = reference.group_advantages(rewards.double(), groups, **options)
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        out = torch.full(rewards.shape, torch.nan, device=device)
        module.group_advantages(rewards.to(device), groups.to(device), **moved, out=out)
        torch.testing.assert_close(out.cpu().double(), want, rtol=1e-6, atol=1e-6)


def test_triton_kernel_under_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra `gpu`)")
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "agreed", result.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    rewards, groups = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tensors are on cpu|not built|not installed"):
        group_advantages(rewards, groups, backend=backend)


def test_bad_choices_are_named() -> None:
    rewards, groups = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    out = torch.zeros(2)
    with pytest.raises(ValueError, match="center is 'median', want one of mean, loo, length, none"):
        _core.group_advantages(rewards, groups, "median", "std", None, 0.0, 1, None, out)
    with pytest.raises(ValueError, match="scale is 'var', want one of std, batch_std, none"):
        _core.group_advantages(rewards, groups, "mean", "var", None, 0.0, 1, None, out)
    with pytest.raises(ValueError, match="center 'length' needs lengths, got None"):
        _core.group_advantages(rewards, groups, "length", "std", None, 0.0, 1, None, out)
