"""Writes to the KV cache: the CPU's results, the choice of backend, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels import native
from eapo_fast.kernels.kv_write import copy_blocks, kv_write
from eapo_fast.kernels.sample import sample

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def step(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    k, v = torch.arange(60).view(2, 5, 2, 3).to(dtype).unbind()
    caches = {name: torch.full((3, 4, 2, 3), -1, dtype=dtype) for name in ("k_cache", "v_cache")}
    return {"k": k, "v": v, **caches, "slots": torch.tensor([7, -1, 0, 11, -5])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cpu_writes_live_slots_only(backend: str, dtype: torch.dtype) -> None:
    arguments = step(dtype)
    kv_write(**arguments, backend=backend)
    for name, new in (("k_cache", "k"), ("v_cache", "v")):
        flat = arguments[name].flatten(0, 1)
        assert torch.equal(flat[[7, 0, 11]], arguments[new][[0, 2, 3]])
        assert bool((flat[[1, 2, 3, 4, 5, 6, 8, 9, 10]] == -1).all())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x[1:], r"k: got shape \[4, 2, 3\], allowed is \[5, 2, 3\]"),
        ("v", lambda x: x.double(), "v: got torch.float64, allowed is torch.float32"),
        ("v_cache", lambda x: x[1:], r"v_cache: got shape \[2, 4, 2, 3\]"),
        ("k_cache", lambda x: x.mT.contiguous().mT, "k_cache: got strides"),
        ("k", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "k: got strides"),
        ("slots", lambda x: x.int(), "slots: got torch.int32, allowed is torch.int64"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    arguments = step()
    with pytest.raises(ValueError, match=message):
        kv_write(**{**arguments, name: change(arguments[name])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_copy_blocks_of_all_layers_on_the_cpu(dtype: torch.dtype) -> None:
    caches = [torch.arange(n * 6).view(6, n).to(dtype) for n in (3, 8, 1)]
    want = [cache.clone() for cache in caches]
    for cache in want:
        cache[[5, 1, 0]] = cache[[0, 0, 3]]
    copy_blocks(caches, torch.tensor([[0, 5], [0, 1], [3, 0]], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    copy_blocks([], torch.tensor([[0, 9]], dtype=torch.int32))


@NO_GPU
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_say_why_they_cannot_run(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = f"cannot run on '{backend}' here: .*(tensors are on cpu|not built|not installed)"
    with pytest.raises(ValueError, match=reason):
        kv_write(**step(), backend=backend)
    with pytest.raises(ValueError, match=reason):
        copy_blocks(torch.zeros(3, 2), torch.zeros(1, 2, dtype=torch.int32), backend=backend)
    zeros, ints = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=reason):
        sample(
            torch.zeros(1, 5),
            rows=ints,
            uniforms=zeros,
            temperatures=zeros,
            top_ks=ints,
            top_ps=zeros,
            min_ps=zeros,
            backend=backend,
        )


def test_refusals_name_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "_has_triton", lambda: True)
    assert native.triton_refusal(torch.zeros(1), native.GPU_STORAGE) is None
    assert native.triton_refusal(torch.zeros(1, dtype=torch.int8), ()) is None
    wide = torch.zeros(1, dtype=torch.float64)
    refusal = native.triton_refusal(wide, native.GPU_STORAGE)
    assert refusal == "it takes float32 or bfloat16 or float16, got torch.float64"
    monkeypatch.setattr(native, "_has_triton", lambda: False)
    assert "not installed" in str(native.triton_refusal(torch.zeros(1)))
