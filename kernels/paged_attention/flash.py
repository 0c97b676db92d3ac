"""flash-attn's own paged kernels, where that package is installed and takes the arguments.

FlashAttention 3 (module `flash_attn_interface`, Hopper) takes any block size; FlashAttention 2
(module `flash_attn`) takes multiples of 256. Both run with one split, and whether they run is a
matter of model, cache and GPU alone, so that a row's bits do not depend on its batch.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels.kv_write import kv_write

_FA2_BLOCK = 256
_MAX_DIM = 256


def flash_refusal(q: Tensor, k_cache: Tensor, sinks: Tensor | None) -> str | None:
    """Return why flash-attn cannot run on this model and cache, or None."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    dim, block_size = q.shape[2], k_cache.shape[1]
    if dim > _MAX_DIM or dim % 8 != 0:
        return f"it takes head dimensions up to {_MAX_DIM} that are multiples of 8, got {dim}"
    if sinks is not None:
        return "it has no attention sinks"
    module = _module(torch.cuda.get_device_capability(q.device)[0])
    if module is None:
        return "flash-attn is not installed (pip install 'eapo_fast[flash]')"
    if module == "flash_attn" and block_size % _FA2_BLOCK != 0:
        return f"flash-attn 2 takes block sizes that are multiples of 256, got {block_size}"
    return None


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    longest: tuple[int, int] | None,
) -> Tensor:
    """Return [T, Hq, D]; arguments as in the public function, no `k` and `v`: they are written."""
    q = _packed(q)
    if k is not None and v is not None:
        kv_write(_packed(k), _packed(v), k_cache, v_cache, slots)
    max_q, max_kv = longest or (int(cu_q.diff().max()), int(kv_lens.max()))
    major = torch.cuda.get_device_capability(q.device)[0]
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (window - 1, 0) if window > 0 else (-1, -1),
        "softcap": softcap,
    }
    name = _module(major)
    if name == "flash_attn_interface":
        out = import_module(name).flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=kv_lens,
            page_table=block_tables,
            cu_seqlens_q=cu_q,
            max_seqlen_q=max_q,
            num_splits=1,
            **options,
        )
    elif max_q == 1 and len(q) == len(kv_lens):
        out = (
            import_module("flash_attn")
            .flash_attn_with_kvcache(
                q.unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=kv_lens,
                block_table=block_tables,
                num_splits=1,
                **options,
            )
            .squeeze(1)
        )
    else:
        cu_k = torch.zeros_like(cu_q)
        cu_k[1:] = kv_lens.cumsum(0)
        out = import_module("flash_attn").flash_attn_varlen_func(
            q, k_cache, v_cache, cu_q, cu_k, max_q, max_kv, block_table=block_tables, **options
        )
    return torch.as_tensor(out)


def _packed(x: Tensor) -> Tensor:
    return x if x[:1].is_contiguous() else x.contiguous()


@cache
def _module(major: int) -> str | None:
    """Module to use on a GPU of compute capability `major`.x, or None."""
    if major == 9 and find_spec("flash_attn_interface") is not None:
        return "flash_attn_interface"
    if major >= 8 and find_spec("flash_attn") is not None:
        return "flash_attn"
    return None
