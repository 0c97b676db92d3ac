"""Runs a Scheduler with a fake model that reads its prefixes from a fake paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from fake_cache import FakeCache
from twin_decoder import TwinRow, TwinRules, fake_logprob, fake_token
from twin_random import sample_uniform

from eapo_fast import _core

PIECES = ("<", "q", ">", "/", "a", "b", "<q", "q>", "</q", "/q>", "b<", "x</q>y", "<q>", "ab", "")
"""Tags are split over these tokens in many ways, and some tokens hold a tag and more."""

TOKEN_BYTES = [piece.encode() for piece in PIECES] + [f"w{i}".encode() for i in range(24)]

VOCABULARY = _core.Vocabulary(TOKEN_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What must not change any result (max_context aside)."""

    num_blocks: int = 64
    block_size: int = 4
    host_blocks: int = 0
    max_batch: int = 8
    max_step_tokens: int = 16
    max_context: int = 48
    prefix_cache: bool = True


W = [TOKEN_BYTES.index(f"w{i}".encode()) for i in range(24)]
"""Tokens that are part of no tag."""


def make_pool(shape: Shape) -> Any:
    """A pool of this shape."""
    return _core.KvPool(shape.num_blocks, shape.block_size, shape.host_blocks)


def scheduler_on(pool: Any, shape: Shape) -> Any:
    """A scheduler of this shape over TOKEN_BYTES."""
    return _core.Scheduler(
        pool,
        VOCABULARY,
        max_batch=shape.max_batch,
        max_step_tokens=shape.max_step_tokens,
        max_context=shape.max_context,
        prefix_cache=shape.prefix_cache,
    )


def make_scheduler(**shape: Any) -> Any:
    """A scheduler of this shape with a pool of its own."""
    return scheduler_on(make_pool(Shape(**shape)), Shape(**shape))


def commit(scheduler: Any, plan: Any, tokens: Sequence[int]) -> list[Any]:
    """Commits these tokens, repeated as needed, with log-probability -0.5."""
    n = len(plan.sample_rows)
    ids = np.resize(np.asarray(tokens, np.int64), n)
    return scheduler.commit(ids, np.full(n, -0.5, np.float32), np.ones(n, np.float32))


def step(scheduler: Any, *tokens: int) -> tuple[Any, list[Any]]:
    """One plan and its events."""
    plan = scheduler.plan()
    return plan, commit(scheduler, plan, tokens)


class Harness:
    """A scheduler, its fake cache, and the twin of every row."""

    def __init__(self, shape: Shape, pool: Any = None, cache: FakeCache | None = None) -> None:
        self.shape = shape
        self.pool = pool or make_pool(shape)
        self.cache = cache or FakeCache(shape.num_blocks, shape.block_size, shape.host_blocks)
        self.scheduler = scheduler_on(self.pool, shape)
        self.twins: dict[int, TwinRow] = {}
        self.groups: dict[int, int] = {}
        self.max_context = min(shape.max_context, shape.num_blocks * shape.block_size)

    def rules(self, rules: TwinRules) -> int:
        """The id of these rules."""
        return self.scheduler.add_rules(**{k: list(v) for k, v in asdict(rules).items()})

    def add(
        self,
        prompt: list[int],
        n: int,
        rules: TwinRules,
        *,
        max_tokens: int,
        prompt_id: int,
        temperatures: tuple[float, ...] = (),
    ) -> list[int]:
        """A prompt group and its twins."""
        seqs = self.scheduler.add_group(
            prompt,
            n,
            self.rules(rules),
            max_tokens,
            temperature=0.75,
            seed=11,
            step=3,
            prompt_id=prompt_id,
            temperature_schedule=temperatures,
        )
        for sample, seq in enumerate(seqs):
            self.groups[seq] = seqs[0]
            self.twins[seq] = TwinRow(
                prompt=prompt,
                rules=rules,
                token_bytes=TOKEN_BYTES,
                max_tokens=max_tokens,
                max_context=self.max_context,
                key=(11, 3, prompt_id, sample),
                temperatures=temperatures or (0.75,),
            )
        return seqs

    def step(self) -> list[Any] | None:
        """One plan, fake forward and commit, compared with the twins; None if nothing can run."""
        runnable = [seq for seq, twin in self.twins.items() if twin.state == "runnable"]
        plan = self.scheduler.plan()
        assert (plan is None) == (not runnable)
        if plan is None:
            return None
        self.scheduler.check()
        assert min(runnable) in plan.seqs, "the oldest row must progress"
        self._check_limits(plan)
        self._check_spans(plan)
        self.cache.forward(plan, self.pool.epoch)
        self._check_cache(plan)
        tokens, logprobs = self._sample(plan)
        events = self.scheduler.commit(tokens, logprobs, np.ones(len(tokens), np.float32))
        self.scheduler.check()
        self._compare(plan.sample_seqs.tolist(), events)
        return events

    def _check_limits(self, plan: Any) -> None:
        assert 0 < len(plan.input_ids) <= self.shape.max_step_tokens
        assert len(plan.seqs) == len(set(plan.seqs.tolist())) <= self.shape.max_batch
        assert self.scheduler.stats()["running"] <= self.shape.max_batch
        assert np.all(np.diff(plan.cu_q) > 0)
        assert plan.max_q_len == np.diff(plan.cu_q).max()
        assert plan.max_kv_len == plan.kv_lens.max()
        assert len(set(plan.slots.tolist())) == len(plan.slots)

    def _check_spans(self, plan: Any) -> None:
        size, alone = self.shape.block_size, np.ones(len(plan.seqs), bool)
        for (first, count), tokens in zip(plan.shared_spans, plan.shared_lens, strict=True):
            rows = slice(first, first + count)
            assert count >= 2
            assert alone[rows].all()
            alone[rows] = False
            assert set(np.diff(plan.cu_q)[rows]) == {1}
            assert len({self.groups[seq] for seq in plan.seqs[rows].tolist()}) == 1
            assert tokens >= size
            assert tokens % size == 0
            assert (plan.kv_lens[rows] > tokens).all()
            tables = plan.block_tables[rows, : tokens // size]
            assert (tables == tables[0]).all()

    def _check_cache(self, plan: Any) -> None:
        """Every row's block table leads to the KV of exactly its tokens, none of it outdated."""
        for row, seq in enumerate(plan.seqs.tolist()):
            entries = self.cache.entries(plan, row)
            assert entries[:, 0].tolist() == self.twins[seq].kv[: len(entries)]
            computed = len(entries) - (plan.cu_q[row + 1] - plan.cu_q[row])
            assert plan.positions[plan.cu_q[row]] == computed
            self.cache.check_epochs(seq, self.groups[seq], entries[:, 1], self.pool.epoch)
        for seq in plan.sample_seqs.tolist():
            self.cache.fork(self.groups[seq], seq)

    def _sample(self, plan: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = np.searchsorted(plan.cu_q, plan.logits_rows, side="right") - 1
        tokens, logprobs = [], []
        columns = (plan.sample_rows, plan.uniforms, plan.temperatures)
        for i, (logits_row, uniform, temperature) in enumerate(zip(*columns, strict=True)):
            row = rows[logits_row]
            assert plan.logits_rows[logits_row] == plan.cu_q[row + 1] - 1
            kv = int(self.cache.entries(plan, row)[-1, 0])
            banned = set(plan.ban_ids[plan.ban_rows == i].tolist())
            tokens.append(fake_token(uniform, kv, banned, len(TOKEN_BYTES)))
            logprobs.append(fake_logprob(uniform, plan.kv_lens[row], temperature))
        return np.array(tokens, np.int64), np.array(logprobs, np.float32)

    def _compare(self, seqs: list[int], events: list[Any]) -> None:
        expected = {}
        for seq in seqs:
            event = self.twins[seq].sample()
            if event is not None:
                expected[seq] = event
            self.compare_row(seq)
        assert {e.seq: (e.kind, e.pattern, e.overshoot) for e in events} == expected

    def compare_row(self, seq: int) -> None:
        """The scheduler's record of a row equals the twin's."""
        got, twin = self.scheduler.tokens(seq), self.twins[seq]
        assert got["token_ids"].tolist() == twin.token_ids
        assert got["logprobs"].tolist() == twin.logprobs
        assert got["mask"].tolist() == twin.mask
        assert got["kept_mass"].tolist() == [1.0] * len(twin.mask)
        assert list(zip(got["ban_positions"], got["ban_ids"], strict=True)) == twin.bans
        assert got["finish_reason"] == twin.finish_reason

    def inject(self, seq: int, ids: list[int]) -> bool:
        """Injects into the row and its twin."""
        accepted = self.scheduler.inject(seq, ids)
        assert accepted == self.twins[seq].inject(ids)
        self.compare_row(seq)
        return accepted

    def finish(self, seq: int, reason: str) -> None:
        """Finishes the row and its twin."""
        self.scheduler.finish(seq, reason)
        self.twins[seq].finish(reason)
        self.compare_row(seq)

    def set_rules(self, seq: int, rules: TwinRules) -> None:
        """Gives the row and its twin other rules."""
        self.scheduler.set_rules(seq, self.rules(rules))
        self.twins[seq].rules = rules

    def release(self, seq: int) -> None:
        """Forgets the row and its twin."""
        self.scheduler.release(seq)
        del self.twins[seq]

    def rows(self, state: str) -> list[int]:
        """Ids of the rows in a state of the twin: runnable, parked, done."""
        return [seq for seq, twin in self.twins.items() if twin.state == state]

    def expected_uniform(self, seq: int) -> float:
        """The uniform of the row's next token."""
        twin = self.twins[seq]
        return sample_uniform(*twin.key, len(twin.token_ids))
