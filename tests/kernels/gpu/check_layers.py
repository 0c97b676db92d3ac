"""RMS norm, rotary embedding and gated activation on a GPU backend, against float64 and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels.gated_activation import KINDS, gated_activation
from eapo_fast.kernels.paged_attention import paged_attention
from eapo_fast.kernels.rms_norm import add_rms_norm, rms_norm, triton_kernel
from eapo_fast.kernels.rotary import rotary, rotary_kv_write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
FORMS: dict[str, dict[str, bool]] = {
    "llama": {},
    "olmo2": {"cast_before_weight": False},
    "gemma": {"cast_before_weight": False, "unit_offset": True},
}
SIZES = [(1, 1), (3, 5), (7, 48), (2, 64), (37, 100), (9, 896), (4, 1000), (1, 3584)]
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place, relative, at most."""


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def strided(x: Tensor, device: torch.device, *, before: int = 1, after: int = 3) -> Tensor:
    """The same rows on the device, inside wider ones of NaN."""
    wide = torch.full((*x.shape[:-1], before + x.shape[-1] + after), torch.nan, dtype=x.dtype)
    wide = wide.to(device)
    inner = wide[..., before : before + x.shape[-1]]
    inner.copy_(x)
    return inner


def assert_close(got: Tensor, want: Tensor) -> None:
    """Within the rounding of float32, or half a unit of a narrower dtype's last place."""
    bound = ULP.get(got.dtype, 0.0) + 2e-6
    torch.testing.assert_close(got.double().cpu(), want, rtol=bound, atol=3e-7)


def assert_same_bits(got: Tensor, want: Tensor, *, rare: float = 0.003) -> None:
    """Equal, but for a share `rare` of entries that a second rounding puts two units off at most.

    Of the last place: float32 sums and exponentials end a hair apart, on two sides of a border.
    """
    assert got.dtype == want.dtype
    got, want = got.cpu(), want.cpu()
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=3e-7)
        return
    tiny = want.abs() < 1e-30  # subnormal numbers on the way may count as zero
    assert bool((got[tiny].abs() < 1e-30).all())
    got, want = got[~tiny], want[~tiny]
    off = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert int(off.max()) <= 2
    assert float((off > 0).double().mean()) <= max(rare, 1.5 / off.numel())


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm(form: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    for rows, width in SIZES:
        x, weight = normal(rows, width, dtype=dtype), normal(width, dtype=dtype, seed=1, scale=0.7)
        got = rms_norm(x.to(device), weight.to(device), 1e-5, **FORMS[form], backend=backend)
        assert got.dtype == dtype
        assert_same_bits(got, rms_norm(x, weight, 1e-5, **FORMS[form], backend="reference"))
        want = rms_norm(x.double(), weight.double(), 1e-5, **FORMS[form], backend="reference")
        if form != "llama":  # one rounding
            assert_close(got, want)
        again = rms_norm(
            strided(x, device), weight.to(device), 1e-5, **FORMS[form], backend=backend
        )
        assert torch.equal(again, got)


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_add_rms_norm(form: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The bits of torch's sum, and of the norm of that sum."""
    for rows, width in SIZES:
        x, residual = (normal(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
        weight = normal(width, dtype=dtype, seed=2).to(device)
        inputs = strided(x, device), residual.to(device), weight, 1e-5
        total, normed = add_rms_norm(*inputs, **FORMS[form], backend=backend)
        assert torch.equal(total.cpu(), x + residual)
        assert torch.equal(normed, rms_norm(total, weight, 1e-5, **FORMS[form], backend=backend))
        wide = residual.float().to(device), weight.float(), 1e-5  # as under autocast
        total, normed = add_rms_norm(inputs[0], *wide, **FORMS[form], backend=backend)
        assert total.dtype == normed.dtype == torch.float32
        assert torch.equal(total.cpu(), x.float() + residual.float())
        assert torch.equal(normed, rms_norm(total, *wide[1:], **FORMS[form], backend=backend))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows count as wide that take little time in the interpreter."""
    monkeypatch.setattr(triton_kernel, "WIDEST", 64)
    monkeypatch.setattr(triton_kernel, "TILE", 32)
    return


@ALL
def test_wide_rows(dtype: torch.dtype, backend: str, device: torch.device, narrow: None) -> None:
    for width in (65, 96, 200):
        x, residual = (normal(3, width, dtype=dtype, seed=seed) for seed in (0, 1))
        weight = normal(width, dtype=dtype, seed=2)
        for form in FORMS.values():
            total, normed = add_rms_norm(
                strided(x, device), residual.to(device), weight.to(device), 1e-5, **form,
                backend=backend,
            )  # fmt: skip
            assert torch.equal(total.cpu(), x + residual)
            assert_same_bits(normed, rms_norm(x + residual, weight, 1e-5, **form), rare=0.01)
            alone = rms_norm(total, weight.to(device), 1e-5, **form, backend=backend)
            assert torch.equal(alone, normed)


def activated(x: Tensor, kind: str) -> Tensor:
    """The activation; x / 2 * (1 + tanh(y)) as x * sigmoid(2 y), since torch's GELU cancels."""
    y = x if kind == "silu" else (8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * y.sigmoid()


@ALL
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation(
    kind: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    for rows, width in [*SIZES, (3, 2500)]:
        gate, up = (normal(2, rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
        got = gated_activation(gate.to(device), up.to(device), kind, backend=backend)
        assert got.is_contiguous()
        assert_same_bits(got, activated(gate.double(), kind).to(dtype) * up)
        both = torch.cat((gate, up), dim=-1).to(device)  # as of one matrix product
        again = gated_activation(*both.chunk(2, dim=-1), kind, backend=backend)
        assert torch.equal(again, got)


@ALL
def test_the_ends(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    gate = torch.tensor([torch.inf, largest, 100.0, 0.0, -0.0, -100.0, -largest, torch.nan])
    gate = gate.to(dtype).to(device)
    up = torch.ones_like(gate)
    for kind in KINDS:
        got = gated_activation(gate, up, kind, backend=backend)
        torch.testing.assert_close(got[:7], gate.clamp(min=0)[:7], rtol=0, atol=1e-30)
        assert got[7].isnan()
    rows = torch.stack([gate, gate.flip(0).nan_to_num(0.0, 1.0, 1.0).clamp(-1, 1), up])
    normed = rms_norm(rows, up, 1e-6, backend=backend)
    assert normed[0].isnan().all()  # of its own row only
    assert normed[1:].isfinite().all()
    empty = rms_norm(rows[:0], up, 1e-6, backend=backend)
    assert empty.shape == (0, 8)
    assert gated_activation(rows[:0], rows[:0], backend=backend).shape == (0, 8)


SHAPES = {
    "qwen2": (1, 9, 14, 2, 64, 64),
    "one": (1, 1, 1, 1, 2, 2),
    "odd": (2, 5, 3, 1, 20, 12),
    "partial": (1, 7, 6, 6, 40, 20),
    "many_heads": (3, 2, 33, 8, 96, 96),
    "wide": (1, 2, 4, 1, 256, 64),
    "unturned": (1, 3, 2, 2, 8, 0),
}
"""Batch, tokens, query heads, key heads, dimension, rotated entries."""


@pytest.mark.parametrize("angles", ["own", "fp32"])
@ALL
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(
    shape: str, dtype: torch.dtype, angles: str, backend: str, device: torch.device
) -> None:
    """Bit for bit what torch gives on the same tensors: products are rounded before the sum."""
    batch, tokens, q_heads, k_heads, dim, rotated = SHAPES[shape]
    q = normal(batch, tokens, q_heads, dim, dtype=dtype).transpose(1, 2)
    k = normal(batch, tokens, k_heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    for rows in {1, batch}:
        phases = normal(rows, tokens, rotated, dtype=torch.float32, seed=2)
        kind = torch.float32 if angles == "fp32" else dtype
        cos, sin = phases.cos().to(kind), phases.sin().to(kind)
        inputs: list[Any] = [x.to(device) for x in (q, k, cos, sin)]
        results = rotary(*inputs, backend=backend)
        want = rotary(q, k, cos, sin, backend="reference")
        exact = rotary(q.double(), k.double(), cos.double(), sin.double(), backend="reference")
        for got, expected, wide in zip(results, want, exact, strict=True):
            assert got.transpose(1, 2).is_contiguous()
            assert torch.equal(got.cpu(), expected)
            scale = float(wide.abs().max())
            bound = (3 * ULP.get(dtype, 0.0) + 1e-6) * max(scale, 1e-9)
            assert float((got.double().cpu() - wide).abs().max()) <= bound


def test_rotary_of_slices(backend: str, device: torch.device) -> None:
    """Queries and keys inside one product's row, and with heads before tokens."""
    joint = normal(1, 6, 7 * 24, dtype=torch.bfloat16).to(device)
    q = joint[..., : 4 * 24].view(1, 6, 4, 24).transpose(1, 2)
    k = joint[..., 4 * 24 : 5 * 24].view(1, 6, 1, 24).transpose(1, 2)
    phases = normal(1, 6, 24, dtype=torch.float32, seed=1).to(device)
    angles = phases.cos().bfloat16(), phases.sin().bfloat16()
    want = rotary(q, k, *angles, backend="reference")
    for inputs in ((q, k), (q.contiguous(), k.contiguous())):
        for got, expected in zip(rotary(*inputs, *angles, backend=backend), want, strict=True):
            assert torch.equal(got, expected)


def test_results_do_not_depend_on_the_batch(backend: str, device: torch.device) -> None:
    x, weight = (normal(*s, dtype=torch.float32).to(device) for s in ((40, 100), (100,)))
    whole = rms_norm(x, weight, 1e-6, backend=backend)
    assert torch.equal(rms_norm(x[17:18], weight, 1e-6, backend=backend), whole[17:18])
    whole = gated_activation(x, x + 1, backend=backend)
    assert torch.equal(gated_activation(x[17:], x[17:] + 1, backend=backend), whole[17:])


def test_bad_arguments_are_named(backend: str, device: torch.device) -> None:
    x = normal(4, 8, dtype=torch.float32).to(device)
    ones = torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"weight: got torch\.bfloat16, allowed is torch\.float32"):
        rms_norm(x, ones.bfloat16(), 1e-6, backend=backend)
    with pytest.raises(ValueError, match=r"weight: got shape \[7\], allowed is \[8\]"):
        rms_norm(x, ones[:7], 1e-6, backend=backend)
    with pytest.raises(ValueError, match=r"x: want rows at one distance .*got shape \[8, 4\]"):
        rms_norm(x.T, ones[:4], 1e-6, backend=backend)
    with pytest.raises(ValueError, match=r"residual: got shape \[3, 8\], allowed is \[4, 8\]"):
        add_rms_norm(x, x[:3], ones, 1e-6, backend=backend)
    with pytest.raises(ValueError, match=r"up: got shape \[4, 7\], allowed is \[4, 8\]"):
        gated_activation(x, x[:, :7].contiguous(), backend=backend)
    heads = x.view(1, 2, 2, 8)
    odd, twice = torch.ones(1, 2, 3, device=device), torch.ones(2, 2, 8, device=device)
    with pytest.raises(ValueError, match="cos: want an even last dimension of at most 8, got 3"):
        rotary(heads, heads, odd, odd, backend=backend)
    with pytest.raises(ValueError, match="cos: want 1 or 1 in the first dimension, got 2"):
        rotary(heads, heads, twice, twice, backend=backend)
    with pytest.raises(ValueError, match=r"k: got shape \[2, 2, 8\]"):
        rotary(heads, heads[0], twice[:1], twice[:1], backend=backend)


@ALL
@pytest.mark.parametrize("shape", ["qwen2", "one", "partial", "many_heads", "unturned"])
def test_rotary_into_the_cache(
    shape: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """The bits of the two ops one after the other, and nothing else in the cache is touched."""
    _, tokens, q_heads, k_heads, dim, rotated = SHAPES[shape]
    sizes = [(tokens, q_heads, dim), (tokens, k_heads, dim), (tokens, k_heads, dim)]
    q, k, v = (strided(normal(*size, dtype=dtype, seed=i), device) for i, size in enumerate(sizes))
    k, v = k.contiguous(), v.contiguous()
    phases = normal(tokens, rotated, dtype=torch.float32, seed=4).to(device)
    cos, sin = phases.cos().to(dtype), phases.sin().to(dtype)
    caches = [torch.full((tokens + 2, 3, k_heads, dim), 7.0, dtype=dtype, device=device)] * 2
    caches = [cache.clone() for cache in caches]
    slots = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(0))[:tokens]
    slots[::3] = -1
    want = [cache.clone() for cache in caches]
    turned, keys = rotary(
        *(x.transpose(0, 1)[None] for x in (q, k)), cos[None], sin[None], backend="reference"
    )
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0].flatten(0, 1)[slot] = keys[0, :, token]
            want[1].flatten(0, 1)[slot] = v[token]
    got = rotary_kv_write(q, k, v, cos, sin, *caches, slots.to(device), backend=backend)
    assert torch.equal(got, turned[0].transpose(0, 1))
    assert got.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    others = [cache.fill_(7.0).clone() for cache in caches]
    plain = rotary_kv_write(q, k, v, cos, sin, *others, slots.to(device), backend="reference")
    assert torch.equal(plain, got)
    assert all(torch.equal(a, b) for a, b in zip(others, want, strict=True))
    got = rotary_kv_write(
        q[:0], k[:0], v[:0], cos[:0], sin[:0], *caches, slots[:0].to(device), backend=backend
    )
    assert got.shape == (0, q_heads, dim)


def test_attention_turns_queries_and_keys(backend: str, device: torch.device) -> None:
    """The bits of `rotary` before `paged_attention`, for decode rows and chunks, and caches."""
    tokens, dim = 7, 32
    q = normal(tokens, 4, dim, dtype=torch.float32).to(device)
    k, v = (normal(tokens, 2, dim, dtype=torch.float32, seed=i).to(device) for i in (1, 2))
    phases = normal(tokens, dim, dtype=torch.float32, seed=3).to(device)
    angles = phases.cos(), phases.sin()
    turned = rotary(
        *(x.transpose(0, 1)[None] for x in (q, k)), *(x[None] for x in angles), backend=backend
    )
    given = [q, k, v], [*(x[0].transpose(0, 1) for x in turned), v]
    for borders in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 5, 7]):
        segments, lens = len(borders) - 1, torch.tensor(borders).diff()
        results = []
        for inputs, turn in zip(given, (angles, None), strict=True):
            caches = [torch.zeros(segments, 8, 2, dim, device=device) for _ in "kv"]
            slots = [8 * s + i for s, n in enumerate(lens.tolist()) for i in range(n)]
            out = paged_attention(
                *inputs,
                *caches,
                slots=torch.tensor(slots, device=device),
                cu_q=torch.tensor(borders, dtype=torch.int32, device=device),
                kv_lens=lens.int().to(device),
                block_tables=torch.arange(segments, dtype=torch.int32, device=device)[:, None],
                scale=0.2,
                angles=turn,
                longest=(int(lens.max()), 8),
                backend=backend,
            )
            results.append([out, *caches])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
