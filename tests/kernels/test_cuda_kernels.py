"""The CUDA kernels: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import emulated_cuda
import pytest
import torch
from gpu_runs import run_checks

KERNELS = ["kv_write", "paged_attention", "cuda_rows", "sample"]
CHECKS = [*KERNELS, "logits_loss"]
EMULATED = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
"""Losses have small Triton kernels beside the CUDA ones."""


@pytest.mark.slow
@pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("check", CHECKS)
def test_emulated(check: str) -> None:
    run_checks(check, "cuda", **EMULATED)


@pytest.mark.slow
@pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("check", KERNELS)
def test_order_of_threads_does_not_matter(check: str) -> None:
    """A barrier that is missing shows when the last thread goes first."""
    run_checks(check, "cuda", **EMULATED, EAPO_EMULATOR_ORDER="descending")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    assert importlib.util.find_spec("eapo_fast._cuda") is not None, "built without CUDA kernels"
    run_checks(check, "cuda")
