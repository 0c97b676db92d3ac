"""The block allocator against a dictionary of reference counts."""

from __future__ import annotations

import random

import pytest

from eapo_fast import _core


def _operate(rng: random.Random, allocator, refs: dict[int, int]) -> None:
    action = rng.choice(["allocate", "allocate", "share", "release", "release"])
    if action == "allocate":
        if len(refs) == allocator.num_blocks:
            with pytest.raises(_core.OutOfBlocks, match="in use"):
                allocator.allocate()
            return
        block = allocator.allocate()
        assert block not in refs
        refs[block] = 1
    elif refs:
        block = rng.choice(list(refs))
        refs[block] += 1 if action == "share" else -1
        getattr(allocator, action)(block)
        if refs[block] == 0:
            del refs[block]


@pytest.mark.parametrize(("num_blocks", "seed"), [(1, 0), (7, 1), (37, 2)])
def test_a_hundred_thousand_operations_equal_a_shadow_model(num_blocks, seed):
    rng, refs = random.Random(seed), {}
    allocator = _core.BlockAllocator(num_blocks, 16)
    for _ in range(100_000 // 3 + 1):
        _operate(rng, allocator, refs)
        assert allocator.num_free == num_blocks - len(refs)
    allocator.check()
    assert [allocator.ref_count(b) for b in range(num_blocks)] == [
        refs.get(b, 0) for b in range(num_blocks)
    ]


def test_the_last_freed_block_comes_first():
    allocator = _core.BlockAllocator(5, 16)
    a, b = allocator.allocate(), allocator.allocate()
    allocator.release(a)
    allocator.release(b)
    assert [allocator.allocate(), allocator.allocate()] == [b, a]


@pytest.mark.parametrize("action", ["share", "release"])
def test_a_free_block_cannot_be_used(action):
    with pytest.raises(ValueError, match=f"cannot {action} block 2: it is free"):
        getattr(_core.BlockAllocator(3, 16), action)(2)


@pytest.mark.parametrize("block", [-1, 3])
def test_an_unknown_block_is_refused(block):
    with pytest.raises(ValueError, match=r"not in \[0, 3\)"):
        _core.BlockAllocator(3, 16).ref_count(block)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (3, 0)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        _core.BlockAllocator(num_blocks, block_size)
