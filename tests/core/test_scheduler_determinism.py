"""Results depend on nothing but the request: not on blocks, budget, batch, pool or waiting time."""

from __future__ import annotations

import random

import pytest
from harness import TOKEN_BYTES, Harness, Shape
from twin_decoder import TwinRules

RULES = TwinRules(
    stop_token_ids=(21,),
    park_patterns=(b"q>", b"<q", b"w1"),
    banned_token_ids=(5,),
    banned_patterns=(b"w22",),
)

SHAPES = {
    "reference": Shape(num_blocks=512, block_size=16, max_batch=64, max_step_tokens=256),
    "blocks-of-1": Shape(num_blocks=2048, block_size=1, max_batch=64, max_step_tokens=256),
    "blocks-of-5": Shape(num_blocks=512, block_size=5, max_batch=64, max_step_tokens=256),
    "chunks-of-3": Shape(num_blocks=512, block_size=16, max_batch=64, max_step_tokens=3),
    "batch-of-1": Shape(num_blocks=512, block_size=16, max_batch=1, max_step_tokens=256),
    "batch-of-7": Shape(num_blocks=512, block_size=16, max_batch=7, max_step_tokens=19),
    "tight-pool": Shape(num_blocks=13, block_size=4, max_batch=64, max_step_tokens=64),
}


def _reply(harness: Harness, seq: int) -> list[int]:
    key = harness.twins[seq].key
    rng = random.Random(f"{key} {len(harness.twins[seq].token_ids)}")
    return rng.choices(range(len(TOKEN_BYTES)), k=rng.randint(0, 6))


def _run(shape: Shape, patience: float) -> tuple[list[dict[str, list[float]]], dict[str, int]]:
    rng, prompts = random.Random(0), random.Random(5)
    harness = Harness(shape)
    for prompt_id in range(9):
        prompt = prompts.choices(range(len(TOKEN_BYTES)), k=prompts.randint(1, 17))
        harness.add(prompt, 1 + prompt_id % 4, RULES, max_tokens=24, prompt_id=prompt_id)
    while harness.step() is not None or harness.rows("parked"):
        for seq in harness.rows("parked"):
            if rng.random() < patience:
                harness.inject(seq, _reply(harness, seq))
    rows = [harness.scheduler.tokens(seq) for seq in sorted(harness.twins)]
    for row in rows:
        reason = row.pop("finish_reason")
        assert reason in {"stop", "length", "error"}
    return [{k: v.tolist() for k, v in row.items()} for row in rows], harness.scheduler.stats()


@pytest.fixture(scope="module")
def reference():
    return _run(SHAPES["reference"], patience=1.0)[0]


@pytest.mark.parametrize("patience", [1.0, 0.2], ids=["quick-replies", "slow-replies"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_are_those_of_the_reference(shape, patience, reference):
    rows, stats = _run(shape, patience)
    assert rows == reference
    assert stats["preemptions"] > 0 or shape is not SHAPES["tight-pool"]


def test_siblings_differ(reference):
    assert len({tuple(row["token_ids"]) for row in reference}) > len(reference) // 2
