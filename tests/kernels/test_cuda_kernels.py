"""The CUDA kernels: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import emulated_cuda
import pytest
import torch
from gpu_runs import Checks, Running, passed, run

KERNELS = ["kv_write", "paged_attention", "cuda_rows", "sample"]
CHECKS = [*KERNELS, "logits_loss"]
EMULATED = (("CUDA_VISIBLE_DEVICES", ""), ("TRITON_INTERPRET", "1"))
"""Losses have small Triton kernels beside the CUDA ones."""
DESCENDING = (*EMULATED, ("EAPO_EMULATOR_ORDER", "descending"))


@pytest.mark.slow
@pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("checks", [Checks(c, "cuda", EMULATED) for c in CHECKS], ids=str)
def test_emulated(checks: Checks, running: Running) -> None:
    running.expect(checks)


@pytest.mark.slow
@pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("checks", [Checks(c, "cuda", DESCENDING) for c in KERNELS], ids=str)
def test_order_of_threads_does_not_matter(checks: Checks, running: Running) -> None:
    """A barrier that is missing shows when the last thread goes first."""
    running.expect(checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    assert importlib.util.find_spec("eapo_fast._cuda") is not None, "built without CUDA kernels"
    passed(run(Checks(check, "cuda")))
