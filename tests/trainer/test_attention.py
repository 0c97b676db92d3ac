"""Attention over a packed row: one launch on a GPU gives what the sequences give one by one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.training import attention
from eapo_fast.training.attention import PackedRow

LENGTHS = [5, 1, 12, 7]


def inputs(heads: int = 4, key_heads: int = 2, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, count, sum(LENGTHS), width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(size, generator=generator).to(torch.bfloat16) for size in sizes]


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float, left: int, softcap: float
) -> Tensor:
    """Attention of each sequence [T, H, D] in float64: positions i - left to i, or 0 to i."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        for i in range(start, stop):
            first = start if left < 0 else max(start, i - left)
            for head in range(q.shape[1]):
                own = head * k.shape[1] // q.shape[1]
                scores = k[first : i + 1, own].double() @ q[i, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[i, head] = scores.softmax(0) @ v[first : i + 1, own].double()
    return out.to(q.dtype)


def torch_varlen(*tensors: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """torch's signature; (-1, 0) is causal, (w, 0) with w + 1 positions, (-1, -1) is neither."""
    assert window_size[1] == 0
    *qkv, borders, same, longest, _ = tensors
    assert borders is same
    assert borders.dtype == torch.int32
    assert longest == max(LENGTHS)
    return by_hand(*qkv, borders, scale, window_size[0], 0.0)


def flash_varlen(
    *tensors: Any,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """flash-attn's signature."""
    assert causal
    assert not dropout_p
    return by_hand(*tensors[:3], tensors[3], softmax_scale, window_size[0], softcap)


def attend(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], **settings: Any) -> Tensor:
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    running = attention._Running(PackedRow(borders, LENGTHS))
    monkeypatch.setattr(attention, "_current", running)
    return attention._attend(SimpleNamespace(layer_idx=0), *tensors, None, **settings)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["torch", "flash"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_launch_is_what_the_sequences_give(
    kernel: str, window: int | None, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sliding_window": window, "scaling": scaling}
    want = attend(monkeypatch, inputs(), **settings)
    calls = []

    def noted(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(own)
            return own(*args, **kwargs)

        return call

    monkeypatch.setattr(attention, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(
        attention, "_flash_varlen", lambda: noted(flash_varlen) if kernel == "flash" else None
    )
    monkeypatch.setattr(attention, "_torch_varlen", lambda: noted(torch_varlen))
    got = attend(monkeypatch, inputs(), **settings)
    assert calls == [flash_varlen if kernel == "flash" else torch_varlen]
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({}, {"softcap": 20.0}),
        ({"width": 12}, {}),
        ({"width": 264}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"s_aux": torch.zeros(4)}),
    ],
)
def test_what_torch_has_not_goes_sequence_by_sequence(
    change: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = change.pop("dtype", torch.bfloat16)
    tensors = [x.to(dtype) for x in inputs(**change)]
    want = attend(monkeypatch, tensors, **settings)
    monkeypatch.setattr(attention, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "_flash_varlen", lambda: None)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: pytest.fail("it was asked"))
    assert torch.equal(attend(monkeypatch, tensors, **settings), want)


def test_torch_s_own_kernel_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer key heads than query heads: newer versions want to be told, older ones do not know."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def new(*, scale: Any = None, window_size: Any = None, enable_gqa: bool = False) -> bool:
        return enable_gqa

    def torch_2_11(*, scale: Any = None, window_size: Any = None) -> str:
        return "2.11"

    def torch_2_10(*, is_causal: bool = False) -> None:
        pytest.fail("it knows no windows")

    for kernel, want in ((new, True), (torch_2_11, "2.11"), (torch_2_10, None)):
        attention._torch_varlen.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        own = attention._torch_varlen()
        assert (None if own is None else own()) == want
    attention._torch_varlen.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert attention._torch_varlen() is None
    attention._torch_varlen.cache_clear()


def test_autocast_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary embedding of a float32 model leaves queries and keys in float32."""
    query, key, value = inputs()
    want = attend(monkeypatch, [query, key, value])
    seen = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.extend(x.dtype for x in args[:3])
        return torch_varlen(*args, **kwargs)

    monkeypatch.setattr(attention, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "_flash_varlen", lambda: None)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: noted)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(monkeypatch, [query.float(), key.float(), value])
    assert seen == [torch.bfloat16] * 3
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)
