"""The block allocator against a dictionary of reference counts."""

from __future__ import annotations

import random

import pytest

from eapo_fast import _core


class Shadow:
    """Reference counts and the free list, in plain Python."""

    def __init__(self, num_blocks: int) -> None:
        self.refs: dict[int, int] = {}
        self.free = list(range(num_blocks))

    def release(self, block: int, keep: bool) -> None:
        """One owner less."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            del self.refs[block]
            self.free.insert(len(self.free) if keep else 0, block)


def _operate(rng: random.Random, allocator, shadow: Shadow) -> None:
    action = rng.choice(["allocate", "allocate", "reuse", "share", "release", "release"])
    if action == "allocate" and not shadow.free:
        with pytest.raises(_core.OutOfBlocks, match="in use"):
            allocator.allocate()
    elif action == "allocate":
        block = allocator.allocate()
        assert block == shadow.free.pop(0)
        shadow.refs[block] = 1
    elif action == "reuse" and shadow.free:
        block = shadow.free.pop(rng.randrange(len(shadow.free)))
        allocator.reuse(block)
        shadow.refs[block] = 1
    elif action == "share" and shadow.refs:
        block = rng.choice(list(shadow.refs))
        allocator.share(block)
        shadow.refs[block] += 1
    elif action == "release" and shadow.refs:
        block, keep = rng.choice(list(shadow.refs)), rng.random() < 0.5
        allocator.release(block, keep=keep)
        shadow.release(block, keep)


@pytest.mark.parametrize(("num_blocks", "seed"), [(1, 0), (7, 1), (37, 2)])
def test_a_hundred_thousand_operations_equal_a_shadow_model(num_blocks, seed):
    rng, shadow = random.Random(seed), Shadow(num_blocks)
    allocator = _core.BlockAllocator(num_blocks, 16)
    for _ in range(100_000 // 3 + 1):
        _operate(rng, allocator, shadow)
        assert allocator.num_free == len(shadow.free)
    allocator.check()
    assert [allocator.ref_count(b) for b in range(num_blocks)] == [
        shadow.refs.get(b, 0) for b in range(num_blocks)
    ]


def test_unwanted_blocks_come_first_then_the_least_recently_freed():
    allocator = _core.BlockAllocator(6, 16)
    blocks = [allocator.allocate() for _ in range(6)]
    for block, keep in zip(blocks, [True, False, True, True, False, True], strict=True):
        allocator.release(block, keep)
    allocator.reuse(blocks[2])
    assert [allocator.allocate() for _ in range(5)] == [blocks[i] for i in (4, 1, 0, 3, 5)]


def test_a_used_block_cannot_be_reused():
    allocator = _core.BlockAllocator(3, 16)
    with pytest.raises(ValueError, match="cannot reuse block 0: it has 1 owners"):
        allocator.reuse(allocator.allocate())


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
