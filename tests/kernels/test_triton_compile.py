"""The sampler's Triton kernels compile for GPUs that are not here, as their host code calls them.

A process of its own compiles, so that it does not matter whether this one interprets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton_aot
from triton_aot import Launch, compiled, recorded

from eapo_fast.kernels.gated_activation import triton_kernel as gated_activation
from eapo_fast.kernels.kv_write import triton_kernel as kv_write
from eapo_fast.kernels.paged_attention import triton_kernel as paged_attention
from eapo_fast.kernels.rms_norm import triton_kernel as rms_norm
from eapo_fast.kernels.rotary import triton_kernel as rotary
from eapo_fast.kernels.sample import triton_kernel as sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_aot.interpreted(), reason="TRITON_INTERPRET is set"),
]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
STEPS: dict[str, dict[str, Any]] = {
    "bf16_64_shared": {"heads": 14, "kv_heads": 2, "dim": 64, "spans": 3},
    "fp16_128_all": {
        "heads": 8,
        "kv_heads": 1,
        "dim": 128,
        "dtype": torch.float16,
        "spans": 3,
        "softcap": 30.0,
        "window": 1000,
        "sinks": True,
    },
    "bf16_256_unsplit": {"heads": 16, "kv_heads": 8, "dim": 256, "segments": 800},
    "bf16_80_odd_blocks": {"heads": 6, "kv_heads": 2, "dim": 80, "block_size": 48},
    "fp32_64_shared": {
        "heads": 14,
        "kv_heads": 2,
        "dim": 64,
        "dtype": torch.float32,
        "spans": 3,
    },
}


def step(
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    segments: int = 8,
    spans: int = 0,
    softcap: float = 0.0,
    window: int = 0,
    sinks: bool = False,
) -> list[Launch]:
    """Launches of a step that mixes decode rows and chunks."""
    tokens = 12 * segments

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    cache = torch.zeros(4, block_size, kv_heads, dim, dtype=dtype)
    with recorded(paged_attention, kv_write) as launches:
        paged_attention.paged_attention(
            torch.zeros(tokens, heads, dim, dtype=dtype),
            torch.zeros(tokens, kv_heads, dim, dtype=dtype),
            torch.zeros(tokens, kv_heads, dim, dtype=dtype),
            cache,
            cache.clone(),
            ints(tokens).long(),
            ints(segments + 1),
            ints(segments),
            ints(segments, 33),
            dim**-0.5,
            softcap,
            window,
            torch.zeros(heads, dtype=dtype) if sinks else None,
            (ints(spans, 2), ints(spans)) if spans else None,
            (40, 2000),
        )
    return launches


def stack_limit(launch: Launch) -> int:
    """Bytes of a thread that may leave the registers: none but in the kernels named here."""
    if launch.args[0].dtype == torch.float32:
        return 32
    return 384 if launch.constants.get("BLOCK_M", 0) > 32 and launch.constants["D"] > 64 else 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", STEPS)
def test_paged_attention(name: str, capability: int) -> None:
    launches = step(**STEPS[name])
    names = {launch.name for launch in launches}
    assert names >= {"write", "attend"}
    assert ("attend_shared" in names) == bool(STEPS[name].get("spans"))
    for launch in launches:
        found = compiled(launch, capability)
        assert found.shared <= SHARED_LIMIT[capability]
        assert found.stack <= stack_limit(launch), launch.name
        if launch.name.startswith("attend") and name != "fp32_64_shared":
            assert "cp.async.cg.shared.global" in found.ptx
            decodes = launch.constants["BLOCK_M"] <= 32
            assert ("wgmma" in found.ptx) == (capability == 90 and not decodes)
            assert ("mma.sync.aligned.m16n8k16" in found.ptx) == (capability == 80 or decodes)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sample(dtype: torch.dtype, capability: int) -> None:
    ints, floats = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    with recorded(sample) as launches:
        logits = torch.zeros(4, 151_936, dtype=dtype)
        sample.sample(logits, ints, floats, floats, ints, floats, floats, ints, ints)
    assert [launch.name for launch in launches] == ["tile_sums", "draw"]
    for launch in launches:
        found = compiled(launch, capability)
        assert found.stack == 0
        assert found.shared <= 48 * 1024


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bf16"])
def test_cache(dtype: torch.dtype, capability: int) -> None:
    caches = [torch.zeros(5, 3, 2, 63, dtype=dtype) for _ in range(4)]
    new, slots = torch.zeros(7, 2, 63, dtype=dtype), torch.zeros(7, dtype=torch.int64)
    with recorded(kv_write) as launches:
        kv_write.kv_write(new, new, caches[0], caches[1], slots)
        kv_write.copy_blocks(caches, torch.zeros(2, 2, dtype=torch.int32))
    assert [launch.name for launch in launches] == ["write", "copy"]
    assert all(compiled(launch, capability).stack == 0 for launch in launches)


def layer(
    dtype: torch.dtype, tokens: int = 8, hidden: int = 896, heads: int = 14, dim: int = 64
) -> list[Launch]:
    """Launches of the pieces of a transformer layer, in every form."""
    x = torch.zeros(1, tokens, hidden, dtype=dtype)
    weight, gate = x[0, 0].clone(), torch.zeros(1, tokens, 4864, dtype=dtype)
    q = torch.zeros(1, tokens, heads * dim, dtype=dtype).view(1, tokens, heads, dim).transpose(1, 2)
    k = torch.zeros(1, tokens, 2 * dim, dtype=dtype).view(1, tokens, 2, dim).transpose(1, 2)
    with recorded(rms_norm, gated_activation, rotary) as launches:
        for residual in (None, x):
            for offset, cast in ((False, True), (False, False), (True, False)):
                form = {"unit_offset": offset, "cast_before_weight": cast}
                rms_norm.rms_norm(x, residual, weight, 1e-6, **form)
        rms_norm.rms_norm(
            x, x.float(), weight.float(), 1e-6, unit_offset=False, cast_before_weight=True
        )  # under autocast
        for kind in ("silu", "gelu_tanh"):
            gated_activation.gated_activation(gate, gate, kind=kind)
        for rotated in (dim, dim // 2):
            for angles in {dtype, torch.float32}:
                cos = torch.zeros(1, tokens, rotated, dtype=angles)
                rotary.rotary(q, k, cos, cos)
                heads = (x[0].transpose(0, 1) for x in (q, k, k))
                cache = torch.zeros(4, 64, 2, dim, dtype=dtype)
                slots = torch.zeros(tokens, dtype=torch.int64)
                rotary.rotary_kv_write(*heads, cos[0], cos[0], cache, cache, slots)
    return launches


LAYERS: dict[str, dict[str, int]] = {
    "0.5B": {},
    "7B": {"hidden": 3584, "heads": 28, "dim": 128},
    "widest": {"hidden": rms_norm.WIDEST, "heads": 64, "dim": 256},
    "wider": {"hidden": 2 * rms_norm.WIDEST + 64},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", LAYERS)
def test_layers(shape: str, dtype: torch.dtype, capability: int) -> None:
    """No stack, and 16 bytes a load and a store where rows are multiples of that."""
    for launch in {triton_aot.variant(x): x for x in layer(dtype, **LAYERS[shape])}.values():
        found = compiled(launch, capability)
        assert found.stack == 0, launch.name
        mixed = launch.constants.get("ADD") and launch.args[0].dtype != launch.args[1].dtype
        assert found.shared <= (4 * launch.constants["BLOCK"] if mixed else 1024)
        assert "ld.global.v4.b32" in found.ptx, launch.name
        assert "st.global.v4.b32" in found.ptx, launch.name


def test_numbers_of_tokens_do_not_recompile_layers() -> None:
    def variants(tokens: int) -> set[str]:
        return {triton_aot.variant(x) for x in layer(torch.bfloat16, tokens)}

    assert variants(9) == variants(16) == variants(1) == variants(2048)


def test_lengths_do_not_recompile() -> None:
    """Steps of other sizes come with the same constants and types."""

    def variants(**sizes: int) -> set[str]:
        launches = step(14, 2, 64, spans=sizes.pop("spans"), **sizes)
        return {triton_aot.variant(launch) for launch in launches}

    assert variants(segments=9, spans=3) == variants(segments=17, spans=1)
    assert variants(segments=9, spans=3) == variants(segments=16, spans=16)
