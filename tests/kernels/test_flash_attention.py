"""When flash-attn is asked, and with which arguments; a stand-in computes what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels.paged_attention import flash, reference

CASES = {"decode": ((1, 40), (1, 300), (1, 7)), "mixed": ((1, 40), (9, 300), (1, 7))}


def stand_in(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Functions of flash-attn 2 and 3 over the reference; they note their arguments."""

    def attend(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cu_q: Tensor,
        lens: Tensor,
        tables: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        calls.append(options)
        none = torch.zeros(len(q), *k_cache.shape[2:], dtype=q.dtype)
        slots = torch.full((len(q),), -1)
        left, right = options["window_size"]
        assert options["causal"]
        assert (left, right) == (-1, -1) or right == 0
        return reference.paged_attention(
            q,
            none,
            none,
            k_cache,
            v_cache,
            slots,
            cu_q,
            lens,
            tables,
            options["softmax_scale"],
            options["softcap"],
            left + 1,
        )

    def with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
        lens = options["cache_seqlens"]
        if "page_table" in options:
            cu_q, tables = options["cu_seqlens_q"], options["page_table"]
            return attend(q, k_cache, v_cache, cu_q, lens, tables, options)
        cu_q = torch.arange(len(q) + 1, dtype=torch.int32)
        out = attend(q[:, 0], k_cache, v_cache, cu_q, lens, options["block_table"], options)
        return out.unsqueeze(1)

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        **options: Any,
    ) -> Tensor:
        assert max_q == int(cu_q.diff().max())
        assert max_k == int(cu_k.diff().max())
        return attend(q, k, v, cu_q, cu_k.diff(), options["block_table"], options)

    return {"flash_attn_with_kvcache": with_kvcache, "flash_attn_varlen_func": varlen}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Both packages are installed, on a Hopper GPU; their calls."""
    calls: list[dict[str, Any]] = []
    for name in ("flash_attn", "flash_attn_interface"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(stand_in(calls))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    flash._module.cache_clear()
    yield calls
    flash._module.cache_clear()


def q_like(dtype: torch.dtype = torch.bfloat16, dim: int = 64, device: str = "cuda") -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 8, dim))


def cache_like(block_size: int) -> Any:
    return SimpleNamespace(shape=(10, block_size, 2, 64))


def refusal(q: Any, block_size: int = 256, sinks: Tensor | None = None) -> str | None:
    return flash.flash_refusal(q, cache_like(block_size), sinks)


def test_refusals_say_why(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(q_like(), 16) is None
    assert refusal(q_like(device="cpu")) == "the tensors are on cpu"
    assert refusal(q_like(torch.float32)) == "it takes float16 or bfloat16, got torch.float32"
    assert "up to 256 that are multiples of 8, got 20" in str(refusal(q_like(dim=20)))
    assert "got 320" in str(refusal(q_like(dim=320)))
    assert refusal(q_like(), sinks=torch.zeros(8)) == "it has no attention sinks"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert refusal(q_like(), 512) is None
    assert "multiples of 256, got 16" in str(refusal(q_like(), 16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "not installed" in str(refusal(q_like()))


def test_flash_attention_2_on_hopper_when_3_is_missing(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    flash._module.cache_clear()
    assert refusal(q_like(), 256) is None
    assert "multiples of 256" in str(refusal(q_like(), 64))


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "window": 30}], ids=["plain", "all"])
def test_arguments(
    options: dict[str, Any],
    case: str,
    major: int,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attention_cases import Step

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    step = Step(segments=CASES[case], q_heads=4, kv_heads=2, block_size=256)
    arguments = {"softcap": 0.0, "window": 0, **step.arguments(), **options}
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    want = reference.paged_attention(**copies)
    got = flash.paged_attention(**arguments, longest=None)
    torch.testing.assert_close(got, want)
    assert torch.equal(arguments["k_cache"].isnan(), copies["k_cache"].isnan())
    assert len(calls) == 1
    by_cache = major == 9 or case == "decode"
    assert calls[0].get("num_splits") == (1 if by_cache else None)
