"""A paged cache in which every slot tells what it holds and under which weights it was computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from twin_decoder import fake_kv


class FakeCache:
    """Per slot (KV, epoch): the KV is a fingerprint of all tokens up to the slot's own.

    It is computed from the KV that the row's block table has for the token before, as a model does,
    so a wrong block spoils all that follows.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int) -> None:
        self.block_size = block_size
        self.blocks = np.full((num_blocks, block_size, 2), -1, np.int64)
        self.host = np.full((host_blocks, block_size, 2), -1, np.int64)
        self._slots = self.blocks.reshape(-1, 2)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def forward(self, plan: Any, epoch: int) -> None:
        """Moves blocks as the plan says, then writes the KV of its tokens."""
        self._move(plan)
        ids, slots = plan.input_ids.tolist(), plan.slots.tolist()
        for row, table in enumerate(plan.block_tables.tolist()):
            begin, end = int(plan.cu_q[row]), int(plan.cu_q[row + 1])
            position = int(plan.kv_lens[row]) - (end - begin)
            kv = 0
            if position > 0:
                block, offset = divmod(position - 1, self.block_size)
                kv = int(self.blocks[table[block], offset, 0])
            for at in range(begin, end):
                block, offset = divmod(position + at - begin, self.block_size)
                assert slots[at] == table[block] * self.block_size + offset
                kv = fake_kv(ids[at], kv)
                self._slots[slots[at]] = kv, epoch

    def _move(self, plan: Any) -> None:
        """All swaps out, then all swaps in, then all copies; each kind in any order."""
        out, into, copies = plan.swap_out, plan.swap_in, plan.copies
        for pairs in (out, into, copies):
            assert len(set(pairs[:, 1].tolist())) == len(pairs), "two moves to one block"
        assert not set(out[:, 1].tolist()) & set(into[:, 0].tolist())
        assert not set(copies[:, 0].tolist()) & set(copies[:, 1].tolist())
        assert not set(into[:, 1].tolist()) & set(copies[:, 1].tolist())
        self.host[out[:, 1]] = self.blocks[out[:, 0]]
        self.blocks[into[:, 1]] = self.host[into[:, 0]]
        self.blocks[copies[:, 1]] = self.blocks[copies[:, 0]]

    def entries(self, plan: Any, row: int) -> NDArray[np.int64]:
        """What the row's block table leads to, [kv_len, 2]."""
        table = plan.block_tables[row]
        return self.blocks[table].reshape(-1, 2)[: plan.kv_lens[row]]

    def fork(self, group: int, member: int) -> None:
        """The member begins with the KV of the prompt."""
        self._epochs.setdefault(member, self._epochs[-1 - group].copy())

    def check_epochs(self, seq: int, group: int, epochs: NDArray[np.int64], now: int) -> None:
        """KV that the row never had is of the current weights (it may have been on the host)."""
        if seq not in self._epochs:
            seq = -1 - group  # the prompt, whichever member computes it
        before = self._epochs.get(seq, epochs[:0])
        n = min(len(before), len(epochs))
        known = np.append(epochs[:n] == before[:n], np.zeros(len(epochs) - n, bool))
        assert (epochs[~known] == now).all(), "KV of old weights was found by its tokens"
        self._epochs[seq] = np.append(epochs, before[n:])
