"""Host time of the C++ scheduler with a fake model.

    pytest benchmarks/bench_scheduler.py

Values come before times: the plans that are timed are checked first. Bars are asserted on the best
of many rounds, which other work on the machine does not change much.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eapo_fast import _core

ROWS, SAMPLES, PROMPT, BLOCK = 256, 8, 400, 16
BAR = 100e-6
"""Seconds for one step of 256 rows, its arrays included."""

FIELDS = [name for name in vars(_core.StepPlan) if not name.startswith("_")]


def _decoding() -> Any:
    """A scheduler whose 256 rows all decode, with more prompts in the queue."""
    rng = np.random.default_rng(0)
    scheduler = _core.Scheduler(
        _core.KvPool(ROWS * 96, BLOCK),
        _core.Vocabulary([b"x"] * 4096),
        max_batch=ROWS,
        max_step_tokens=ROWS + 2048,
        max_context=4096,
    )
    rules = scheduler.add_rules()
    for prompt_id in range(100):
        prompt = rng.integers(1, 4096, PROMPT).tolist()
        scheduler.add_group(prompt, SAMPLES, rules, 1000, seed=1, prompt_id=prompt_id)
    while len(_step(scheduler)) != ROWS:
        pass
    return scheduler


def _step(scheduler: Any) -> NDArray[np.int64]:
    """Plans, reads every array and commits tokens that depend on the draws; returns input_ids."""
    plan = scheduler.plan()
    arrays = {name: getattr(plan, name) for name in FIELDS}
    tokens = (arrays["uniforms"] * 4096).astype(np.int64)
    ones = np.ones(len(tokens), np.float32)
    scheduler.commit(tokens, ones, ones)
    return arrays["input_ids"]


def _check(scheduler: Any) -> None:
    """The plan of a decode step is what the rows' records say."""
    plan = scheduler.plan()
    seqs = plan.seqs.tolist()
    assert seqs == plan.sample_seqs.tolist() == sorted(seqs)
    lengths = [PROMPT + len(scheduler.tokens(seq)["token_ids"]) for seq in seqs]
    assert plan.kv_lens.tolist() == lengths
    assert plan.positions.tolist() == [length - 1 for length in lengths]
    assert plan.input_ids.tolist() == [scheduler.tokens(seq)["token_ids"][-1] for seq in seqs]
    blocks = plan.block_tables[np.arange(ROWS), plan.positions // BLOCK]
    assert np.array_equal(plan.slots, blocks.astype(np.int64) * BLOCK + plan.positions % BLOCK)
    assert len(set(plan.slots.tolist())) == ROWS
    groups = Counter(seq // SAMPLES for seq in seqs)
    assert plan.shared_spans[:, 1].tolist() == [n for n in groups.values() if n > 1]
    assert set(plan.shared_lens.tolist()) == {PROMPT // BLOCK * BLOCK}
    draws = [
        _core.keyed_uniform(1, "sample", [0, seq // SAMPLES, seq % SAMPLES, length - PROMPT])
        for seq, length in zip(seqs, lengths, strict=True)
    ]
    assert np.abs(plan.uniforms - draws).max() < 2**-23
    ones = np.ones(ROWS, np.float32)
    scheduler.commit(np.ones(ROWS, np.int64), ones, ones)
    scheduler.check()


def bench_decode_steps(benchmark):
    """Sixteen steps of 256 rows: every row fills one block and begins the next."""
    scheduler = _decoding()
    _check(scheduler)

    def steps() -> None:
        for _ in range(BLOCK):
            _step(scheduler)

    benchmark.pedantic(steps, rounds=30)
    _check(scheduler)
    benchmark.extra_info["best_ms_per_step"] = 1e3 * benchmark.stats["min"] / BLOCK
    assert benchmark.stats["min"] / BLOCK < BAR


def _crowd(num_blocks: int) -> dict[str, Any]:
    """5,000 rows of 16..256 tokens with random consults; what they cost and what they wrote."""
    rng, draws, batch = random.Random(0), np.random.default_rng(0), 256
    scheduler = _core.Scheduler(
        _core.KvPool(num_blocks, BLOCK),
        _core.Vocabulary([b"x"] * 60 + [b"P"] + [b"y"] * 3),
        max_batch=batch,
        max_step_tokens=batch + 1024,
        max_context=2048,
    )
    rules = scheduler.add_rules(stop_token_ids=[63], park_patterns=[b"P"])
    scheduler.set_prefill_rate(num_blocks * BLOCK / 20.0)
    left: dict[int, int] = {}
    for prompt_id in range(5000 // SAMPLES):
        prompt = [rng.randrange(60) for _ in range(64)]
        for seq in scheduler.add_group(prompt, SAMPLES, rules, 256, prompt_id=prompt_id):
            left[seq] = rng.randint(16, 256)
    waiting: list[tuple[int, int]] = []
    now, tokens, times, least = 0, 0, [], num_blocks
    while True:
        while waiting and waiting[0][0] <= now:
            scheduler.inject(heapq.heappop(waiting)[1], [1] * rng.randint(1, 40))
        start = time.perf_counter()
        plan = scheduler.plan()
        spent = time.perf_counter() - start
        if plan is None and not waiting:
            break
        if plan is None:
            now = waiting[0][0]
            continue
        ids = draws.integers(0, 60, len(plan.sample_seqs))
        ids[draws.random(len(ids)) < 0.02] = 60
        for i, seq in enumerate(plan.sample_seqs.tolist()):
            left[seq] -= 1
            ids[i] = 63 if left[seq] <= 0 else ids[i]
        ones = np.ones(len(ids), np.float32)
        start = time.perf_counter()
        events = scheduler.commit(ids, ones, ones)
        times.append(spent + time.perf_counter() - start)
        for event in events:
            if event.kind == "parked":
                wait = rng.randint(1, 400)
                heapq.heappush(waiting, (now + wait, event.seq))
                scheduler.expect_wait(event.seq, wait * 0.05)
        now, tokens = now + 1, tokens + len(plan.input_ids)
        least = min(least, scheduler.stats()["free_blocks"])
    scheduler.check()
    reasons = {scheduler.tokens(seq)["finish_reason"] for seq in left}
    return {
        "reasons": reasons,
        "blocks": num_blocks - least,
        "tokens": tokens,
        "median_us": 1e6 * float(np.median(times)),
        "p90_us": 1e6 * float(np.percentile(times, 90)),
    } | scheduler.stats()


def bench_five_thousand_rows_through_a_small_pool(benchmark):
    """The work of a pool that is three times too small stays below that of a large one / 0.6."""
    large = _crowd(40_000)
    assert large["blocks"] < 40_000, "the large pool must be large enough"
    small = benchmark.pedantic(_crowd, [large["blocks"] // 3], rounds=1)
    for run in (large, small):
        assert run["reasons"] <= {"stop", "length"}
        assert run["running"] == run["waiting"] == run["parked"] == 0
    share = large["tokens"] / small["tokens"]
    benchmark.extra_info.update(
        share_of_large_pool=share,
        large={k: v for k, v in large.items() if k != "reasons"},
        small={k: v for k, v in small.items() if k != "reasons"},
    )
    assert share > 0.6
    assert small["median_us"] < 2e6 * BAR
