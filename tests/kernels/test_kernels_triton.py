"""The Triton kernels: interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_runs import Checks, Running, passed, run

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
ON_THE_LIBRARY = ["linear_loss", "linear_plans"]
INTERPRETED = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))


@pytest.fixture(autouse=True)
def triton() -> None:
    """Skip without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra `gpu`)")


@pytest.mark.slow
@pytest.mark.parametrize("checks", [Checks(c, "triton", INTERPRETED) for c in CHECKS], ids=str)
def test_interpreted(checks: Checks, running: Running) -> None:
    running.expect(checks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checks", [Checks(c, "cuda", INTERPRETED) for c in ON_THE_LIBRARY], ids=str
)
def test_products_of_the_library(checks: Checks, running: Running) -> None:
    """Rows in Triton, products by torch; on a CPU those are the CPU's."""
    running.expect(checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    passed(run(Checks(check, "triton", (("TRITON_INTERPRET", "0"),))))
