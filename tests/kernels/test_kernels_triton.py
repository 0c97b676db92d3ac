"""The Triton kernels: interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_runs import run_checks

CHECKS = [
    "fused",
    "kv_write",
    "layers",
    "linear_loss",
    "linear_plans",
    "logits_loss",
    "paged_attention",
    "policy_loss",
    "sample",
    "shared_prefix",
    "truncation",
]


@pytest.fixture(autouse=True)
def triton() -> None:
    """Skip without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra `gpu`)")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str) -> None:
    run_checks(check, "triton", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["linear_loss", "linear_plans"])
def test_products_of_the_library(check: str) -> None:
    """Rows in Triton, products by torch; on a CPU those are the CPU's."""
    run_checks(check, "cuda", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    run_checks(check, "triton", TRITON_INTERPRET="0")
