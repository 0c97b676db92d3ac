"""RMS norm, gated activation and rotary embedding against float64 and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as partial_rotary

from eapo_fast import _core
from eapo_fast.kernels.gated_activation import KINDS, gated_activation
from eapo_fast.kernels.paged_attention import flash, paged_attention
from eapo_fast.kernels.rms_norm import add_rms_norm, rms_norm
from eapo_fast.kernels.rotary import rotary

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NORMS = {
    LlamaRMSNorm: {},
    Olmo2RMSNorm: {"cast_before_weight": False},
    Gemma2RMSNorm: {"cast_before_weight": False, "unit_offset": True},
}


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """Distance of bfloat16 tensors in units of the last place (of equal signs)."""
    assert got.dtype == want.dtype == torch.bfloat16
    return (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()


def assert_rounded_alike(got: Tensor, want: Tensor, *, rare: float = 0.002) -> None:
    """The same bits, but for a share `rare` of entries that are one unit in the last place off."""
    off = ulps(got, want)
    assert int(off.max()) <= 1
    assert float((off > 0).double().mean()) <= rare


@pytest.mark.parametrize("size", [1, 5, 16, 48, 256, 1000])
@pytest.mark.parametrize("form", NORMS.values(), ids=["llama", "olmo2", "gemma"])
def test_rms_norm_matches_float64(isa: str, form: dict[str, bool], size: int) -> None:
    x, weight = normal(3, 7, size), normal(size, seed=1, scale=1.0)
    got = rms_norm(x, weight, 1e-6, **form, backend="cpu")
    want = rms_norm(x.double(), weight.double(), 1e-6, **form, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("module", NORMS, ids=lambda m: m.__name__)
def test_rms_norm_rounds_like_the_module(
    isa: str, module: type[nn.Module], dtype: torch.dtype
) -> None:
    norm = module(384, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(384, seed=2, scale=0.5))
        x = normal(2, 41, 384).to(dtype)
        want = norm(x)
    got = rms_norm(x, norm.weight, 1e-5, **NORMS[module], backend="cpu")
    assert not got.requires_grad
    if dtype == torch.bfloat16:
        assert_rounded_alike(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 5, 16, 48, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation_matches_float64(isa: str, kind: str, size: int) -> None:
    gate, up = normal(2, 9, size), normal(2, 9, size, seed=1)
    got = gated_activation(gate, up, kind, backend="cpu")
    want = gated_activation(gate.double(), up.double(), kind, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation_rounds_like_torch(isa: str, kind: str, dtype: torch.dtype) -> None:
    activation: Callable[[Tensor], Tensor] = nn.SiLU() if kind == "silu" else GELUTanh()
    both = normal(4, 33, 2 * 200).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    got, want = gated_activation(gate, up, kind, backend="cpu"), activation(gate) * up
    assert got.is_contiguous()
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    elif kind == "silu":
        assert_rounded_alike(got, want)
    else:  # torch's 1 + tanh cancels: far below zero its result has no digit left
        near = gate > -3
        assert_rounded_alike(got[near], want[near])
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def test_activations_at_the_ends(isa: str) -> None:
    gate = torch.tensor([torch.inf, 1e38, 100.0, 0.0, -0.0, -100.0, -1e38, torch.nan])
    up = torch.ones(8)
    for kind in KINDS:
        got = gated_activation(gate, up, kind, backend="cpu")
        torch.testing.assert_close(got[:7], gate.clamp(min=0)[:7], rtol=0, atol=0)
        assert got[7].isnan()
    assert rms_norm(gate[-2:], up[:2], 1e-6, backend="cpu").isnan().all()
    halves = gated_activation(gate.bfloat16(), up.bfloat16(), backend="cpu")
    assert halves.isnan().tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("dtype", "angles"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=["fp32", "bf16", "bf16-fp32-angles"],
)
@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (32, 32), (96, 96), (40, 20), (64, 16)])
def test_rotary_matches_transformers(
    isa: str, width: int, rotated: int, dtype: torch.dtype, angles: torch.dtype
) -> None:
    q = normal(2, 13, 6, width).to(dtype).transpose(1, 2)
    k = normal(2, 13, 2, width, seed=1).to(dtype).transpose(1, 2)
    phases = normal(1, 13, rotated, seed=2)
    cos, sin = phases.cos().to(angles), phases.sin().to(angles)
    want = (apply_rotary_pos_emb if rotated == width else partial_rotary)(q, k, cos, sin)
    for got, expected in zip(rotary(q, k, cos, sin, backend="cpu"), want, strict=True):
        assert got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        if dtype == torch.bfloat16:
            assert torch.equal(got, expected.to(dtype))
        else:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


def test_rotary_takes_angles_per_batch_row(isa: str) -> None:
    q, k, phases = normal(3, 4, 5, 16), normal(3, 2, 5, 16, seed=1), normal(3, 5, 16, seed=2)
    got = rotary(q, k, phases.cos(), phases.sin(), backend="cpu")
    want = rotary(q.double(), k.double(), phases.cos().double(), phases.sin().double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-6)


def test_results_do_not_depend_on_threads_or_batch(isa: str) -> None:
    x, weight = normal(300, 512), normal(512, seed=1)
    q, phases = normal(1, 300, 16, 64).transpose(1, 2), normal(1, 300, 64, seed=2)
    runs: dict[str, Callable[[slice], Any]] = {
        "norm": lambda part: rms_norm(x[part], weight, 1e-6, backend="cpu"),
        "gate": lambda part: gated_activation(x[part], x[part] + 1, backend="cpu"),
        "rotary": lambda part: rotary(
            q[:, :, part], q[:, :2, part], phases[:, part], phases[:, part], backend="cpu"
        )[0][0].transpose(0, 1),
    }
    threads = _core.num_threads()
    try:
        for run in runs.values():
            _core.set_num_threads(1)
            whole = run(slice(None))
            _core.set_num_threads(3)
            assert torch.equal(run(slice(None)), whole)
            assert torch.equal(run(slice(17, 18)), whole[17:18])
    finally:
        _core.set_num_threads(threads)


def test_bad_arguments_are_named() -> None:
    x = normal(4, 8)
    with pytest.raises(TypeError, match="weight: want float32 like x, got bfloat16"):
        rms_norm(x, torch.ones(8).bfloat16(), 1e-6)
    with pytest.raises(ValueError, match=r"weight: want shape \[8\]"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="eps is -1, want >= 0"):
        rms_norm(x, torch.ones(8), -1.0)
    with pytest.raises(ValueError, match=r"x: want rows at one distance .*got shape \[8, 4\]"):
        rms_norm(x.T, torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="rms_norm has no 'cuda' implementation"):
        rms_norm(x, torch.ones(8), 1e-6, backend="cuda")
    with pytest.raises(ValueError, match=r"up: want shape \[4, 8\] like gate, got \[4, 7\]"):
        gated_activation(x, x[:, :7].contiguous())
    with pytest.raises(ValueError, match=r"kind: got 'gelu', .* Did you mean 'gelu_tanh'"):
        gated_activation(x, x, "gelu")
    heads = x.view(1, 2, 2, 8)
    with pytest.raises(ValueError, match="cos: want an even last dimension of at most 8, got 3"):
        rotary(heads, heads, torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="cos: want 1 or 1 in the first dimension, got 2"):
        rotary(heads, heads, torch.ones(2, 2, 8), torch.ones(2, 2, 8))
    halves = torch.ones(1, 2, 8).bfloat16()
    with pytest.raises(TypeError, match="cos: want float32 like x, got bfloat16"):
        rotary(heads, heads, halves, halves)


def test_sum_and_norm_at_once() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, residual = normal(3, 5, 24).to(dtype), normal(3, 5, 24, seed=1).to(dtype)
        weight = normal(24, seed=2).to(dtype)
        for form in NORMS.values():
            total, norm = add_rms_norm(x, residual, weight, 1e-6, **form)
            assert torch.equal(total, x + residual)
            assert torch.equal(norm, rms_norm(total, weight, 1e-6, **form))
    with pytest.raises(ValueError, match=r"residual: got torch\.float64 \[3, 4, 24\], allowed is"):
        add_rms_norm(x, residual[:, :4], weight, 1e-6)


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert gated_activation(torch.empty(2, 0, 8), torch.empty(2, 0, 8)).shape == (2, 0, 8)


@pytest.mark.parametrize("backend", ["cpu", "flash", "reference"])
def test_attention_turns_queries_and_keys_first(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every backend: the result and the caches of `rotary` before `paged_attention`."""
    q, k, v = normal(5, 4, 16), normal(5, 2, 16, seed=1), normal(5, 2, 16, seed=2)
    phases = normal(5, 16, seed=3)
    angles = phases.cos(), phases.sin()
    turned = rotary(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *(x[None] for x in angles))
    if backend == "flash":  # what its module would be asked for, once the cache is written

        def attend(q: Tensor, k: None, v: None, **arguments: Any) -> Tensor:
            assert (k, v) == (None, None)
            absent = torch.full_like(arguments["slots"], -1)
            none = torch.zeros(5, 2, 16)
            arguments |= {"slots": absent, "backend": "reference"}
            return paged_attention(q, none, none, **arguments)

        monkeypatch.setattr(flash, "flash_refusal", lambda *_, **__: None)
        monkeypatch.setattr(flash, "paged_attention", attend)
    results = []
    turned_q, turned_k = (x[0].transpose(0, 1).contiguous() for x in turned)
    for inputs, how in (((q, k, v), angles), ((turned_q, turned_k, v), None)):
        caches = torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16)
        out = paged_attention(
            *inputs,
            *caches,
            slots=torch.tensor([0, 1, 2, 4, -1]),
            cu_q=torch.tensor([0, 3, 5], dtype=torch.int32),
            kv_lens=torch.tensor([3, 2], dtype=torch.int32),
            block_tables=torch.tensor([[0], [1]], dtype=torch.int32),
            scale=0.25,
            angles=how,
            longest=(3, 4),
            backend=backend if how is not None or backend != "flash" else "reference",
        )
        results.append((out, *caches))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)
