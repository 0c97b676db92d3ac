"""Stages of the GPU check on a pretended GPU: the branches that only a GPU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pretended_gpu import OnGpu, pretended


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended GPU on which every op takes its reference: kernels are checked elsewhere."""
    from eapo_fast.kernels import native

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(native, "_has_triton", lambda: False)
    with pretended(monkeypatch):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def run_stage(
    gpu: None, make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, list[dict[str, Any]]]]:
    """Run a stage; returns its records by kind."""
    from gpu_check import trace
    from gpu_check.records import Recorder, read_records

    def run(name: str) -> dict[str, list[dict[str, Any]]]:
        module: Any = import_module(f"gpu_check.{name}")
        monkeypatch.setattr(module, "replayed", lambda work, device: work, raising=False)
        monkeypatch.setattr(trace, "started", lambda: "a profiler without events")
        request = make_request(name, device="cuda", gpu="NVIDIA H200", seconds=500.0)
        module.run(request, Recorder(request))
        records = read_records(Path(request.results))
        return {k: [r for r in records if r["kind"] == k] for k in ("check", "figure", "skip")}

    return run


def test_mistakes_of_devices_show(gpu: None) -> None:
    x, host = torch.zeros(3, device="cuda"), torch.ones(3)
    assert isinstance(x + 1, OnGpu)
    assert str((x * torch.tensor(2.0)).device) == "cuda:0"
    assert not isinstance(x.cpu(), OnGpu)
    assert isinstance(host.to(x), OnGpu)
    for mistake in (
        lambda: x + host,
        lambda: torch.cat([x, host]),
        lambda: host[x.long()],
        lambda: torch.where(x > 0, x, host),
    ):
        with pytest.raises(RuntimeError, match="expected all on one device"):
            mistake()
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.numpy()
    x[1:] = host[:2]
    assert x.tolist() == [0.0, 1.0, 1.0]
    uploaded = torch.from_numpy(np.ones(2)).to("cuda", non_blocking=True)
    assert isinstance(uploaded, OnGpu)


def test_modules_move(gpu: None) -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    with torch.device("cuda"):
        born = torch.nn.Linear(3, 2)
    for module in (layer, born.to(torch.bfloat16).float()):
        loss = module(torch.ones(1, 3, device="cuda")).sum()
        loss.backward()
        assert module.weight.grad is not None
        assert {p.device.type for p in module.parameters()} == {"cuda"}
        with pytest.raises(RuntimeError, match="expected all on one device"):
            module(torch.ones(1, 3))


def test_the_sampler_s_benchmark(run_stage: Callable[[str], Any]) -> None:
    found = run_stage("bench_sampler")
    assert all(r["passed"] for r in found["check"])
    names = [r["name"] for r in found["figure"]]
    assert "decode step, tiny shape, 16 rows: share of GEMM + KV floor" in names


def test_the_kernels_benchmark(run_stage: Callable[[str], Any]) -> None:
    """Nothing but references here: what the stage itself does must fit a GPU."""
    found = run_stage("bench_kernels")
    assert not found["check"]
    assert {"decode, 4 x 130 keys, triton", "rotary, 5 tokens, triton"} <= {
        r["name"] for r in found["skip"]
    }


@pytest.mark.slow
def test_the_step_s_benchmark(run_stage: Callable[[str], Any]) -> None:
    """Rollouts, consults and updates under bfloat16 autocast; a trace that shows nothing."""
    found = run_stage("bench_step")
    assert [r["passed"] for r in found["check"]] == [True]
    names = [r["name"] for r in found["figure"]]
    assert {"step, rollout", "step, update", "idle share of the GPU, NVML"} <= set(names)
    assert [r["name"] for r in found["skip"]] == ["trace of a step"]
