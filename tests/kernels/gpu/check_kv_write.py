"""Writes to the KV cache on a GPU backend: bytes go where they should and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eapo_fast.kernels.kv_write import copy_blocks, kv_write

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
SHAPES = {
    "usual": (37, 2, 64, 16),
    "one_element": (5, 1, 1, 3),
    "odd": (19, 3, 7, 1),
    "wide": (4, 9, 256, 32),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kv_write(shape: str, dtype: str, backend: str, device: torch.device) -> None:
    tokens, heads, dim, block_size = SHAPES[shape]
    blocks = tokens // block_size + 3
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[::3] = torch.where(torch.arange(len(slots[::3])) % 2 == 0, -1, -(10**9))
    k, v = (numbers((tokens, heads, dim), DTYPES[dtype], seed) for seed in (1, 2))
    caches = [numbers((blocks, block_size, heads, dim), DTYPES[dtype], seed) for seed in (3, 4)]
    want = [cache.clone() for cache in caches]
    for cache, new in zip(want, (k, v), strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache.flatten(0, 1)[slot] = new[token]
    moved = [cache.to(device) for cache in caches]
    kv_write(k.to(device), v.to(device), *moved, slots.to(device), backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, want, strict=True))


def test_kv_write_of_slices(backend: str, device: torch.device) -> None:
    """Keys and values inside a wider tensor, at addresses of no great alignment."""
    packed = numbers((11, 7, 5), torch.bfloat16, 0).to(device)
    k, v = packed[:, 1:3], packed[:, 4:6]
    k_cache, v_cache = (torch.zeros(4, 3, 2, 5, dtype=torch.bfloat16, device=device) for _ in "kv")
    slots = torch.arange(11, device=device)
    kv_write(k, v, k_cache, v_cache, slots, backend=backend)
    assert torch.equal(k_cache.flatten(0, 1)[:11], k)
    assert torch.equal(v_cache.flatten(0, 1)[:11], v)
    kv_write(k[:0], v[:0], k_cache, v_cache, slots[:0], backend=backend)
    assert torch.equal(k_cache.flatten(0, 1)[:11], k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks_of_all_layers(dtype: str, backend: str, device: torch.device) -> None:
    """Caches of several sizes at once; a block is read before a later pair overwrites it."""
    shapes = [(7, 3, 2, 5), (7, 16, 2, 64), (7, 3, 2, 5), (9, 1, 1, 1), (7, 40, 4, 128)]
    caches = [numbers(shape, DTYPES[dtype], seed) for seed, shape in enumerate(shapes)]
    pairs = torch.tensor([[0, 5], [0, 1], [6, 2], [3, 0]], dtype=torch.int32)
    want = [cache.clone() for cache in caches]
    for cache in want:
        cache[[5, 1, 2, 0]] = cache[[0, 0, 6, 3]]
    moved = [cache.to(device) for cache in caches]
    copy_blocks(moved, pairs.to(device), backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, want, strict=True))
    copy_blocks(moved, pairs[:0].to(device), backend=backend)
    copy_blocks(moved[0], pairs[:1].to(device), backend=backend)
    assert torch.equal(moved[0].cpu()[5], want[0][0])


def test_many_layers(backend: str, device: torch.device) -> None:
    """More caches than travel with one launch."""
    caches = [torch.full((3, 2), float(i), device=device) for i in range(300)]
    for cache in caches:
        cache[1] += 0.5
    pairs = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    copy_blocks(caches, pairs, backend=backend)
    assert all(torch.equal(cache[2], cache[1]) for cache in caches)
    assert [float(cache[0, 0]) for cache in caches] == list(range(300))
