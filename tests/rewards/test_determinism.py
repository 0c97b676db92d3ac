"""One verdict, whatever the order, the number of threads, the hash seed and the load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CODE = """
import random, sys
from concurrent.futures import ThreadPoolExecutor
from eapo_fast.rewards import verdict, verify
import hostile_cases, test_symbolic, test_verify

pairs = [(a, b) for m in (test_verify, test_symbolic)
         for group in ("EQUAL", "DIFFERENT", "UNDECIDED", "CORRECT", "INCORRECT")
         for a, b, *_ in getattr(m, group, [])]
for group in ("UNICODE", "CODE", "LOOKALIKES"):
    pairs += getattr(hostile_cases, group).values()

def check(pair):
    found = verify(*pair, extract="none")
    return pair, found.status, found.reason

for shuffle, workers in enumerate((1, 2, 4, 8)):
    for cached in (verdict._compare_cached, verdict._compare_symbolically):
        cached.cache_clear()
    order = pairs[:]
    random.Random(int(sys.argv[1]) * 4 + shuffle).shuffle(order)
    with ThreadPoolExecutor(workers) as threads:
        found = sorted(threads.map(check, order))
    print(ascii(found))
"""


@pytest.mark.slow
def test_verdicts_are_the_same_over_orders_threads_and_hash_seeds() -> None:
    """Twenty shuffles: four in each of five processes, which run side by side."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONHASHSEED": str(seed)},
        )
        for seed in range(5)
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [len(lines) for lines in outputs] == [4] * 5
    verdicts = [ast.literal_eval(line) for lines in outputs for line in lines]
    differing = [seen for seen in map(set, zip(*verdicts, strict=True)) if len(seen) > 1]
    assert differing == []
