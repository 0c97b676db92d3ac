"""`rewards.verify` against math-verify 0.9.0: the same inputs, one run, one core.

    python benchmarks/bench_verify.py [--repeats 3] [--peer-limit 500]

Values first: every gold solution of GSM8K and MATH-500 must be correct and no solution may be
accepted for another problem's different answer before a time is printed. Three kinds of passes:
`gold` checks each problem's own solution; `wrong` checks it against another problem's answer;
`rollouts` checks 16 completions a problem, 12 of them wrong in three ways, in the order in which a
training run would. `cold` passes start with empty caches, `warm` ones are a later pass. Times are
CPU times of this process, the best of the repeats; passes of the two graders alternate and
math-verify gets its own defaults.

Agreement is reported over the passes and over the pairs of `tests/rewards`; every disagreement is
written to `benchmarks/results/verify_disagreements.jsonl` with what we make of its class.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eapo_fast.rewards import verdict, verify
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.tree import Call, Operator, Power, Symbol, walk

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
LENGTH = 4096
FILLER = "We set up the equation, simplify both sides and check that the value makes sense. "
Pair = tuple[str, str]


def load_pairs(name: str) -> list[Pair]:
    """Return (solution text, gold answer) of each problem, as issue 6 defines the texts."""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    if name.startswith("gsm8k"):
        return [(f"{row['solution']}\n#### {row['answer']}", row["answer"]) for row in rows]
    return [(row["solution"], row["answer"]) for row in rows]


def padded(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs with texts of 4 KB: filler in front, the solution at the end."""
    filler = FILLER * (LENGTH // len(FILLER) + 1)
    return [(filler[: max(0, LENGTH - len(text))] + text, gold) for text, gold in pairs]


def shifted(pairs: Sequence[Pair]) -> list[Pair]:
    """Return each text with the next answer that differs from its own as text."""
    moved = [(text, pairs[(i + 7) % len(pairs)][1]) for i, (text, _) in enumerate(pairs)]
    return [new for new, (_, gold) in zip(moved, pairs, strict=True) if new[1] != gold]


def rollouts(pairs: Sequence[Pair]) -> list[Pair]:
    """Return 16 texts a problem: 4 right ones and 12 with three wrong answers."""
    wrong = [shift % len(pairs) for shift in (3, 11, 29)]
    return [
        (pairs[(i + (0 if sample % 4 == 0 else wrong[sample % 4 - 1])) % len(pairs)][0], gold)
        for i, (_, gold) in enumerate(pairs)
        for sample in range(16)
    ]


def low_tiers(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs whose answers need no tier above 2: numbers, texts and collections."""

    def simple(answer: str) -> bool:
        kinds = {type(node) for node in walk(parse(answer))}
        return not kinds & {Call, Operator, Power, Symbol}

    return [(text, gold) for text, gold in pairs if simple(gold)]


def clear_caches() -> None:
    """Forget every answer seen."""
    parse_short = verdict.parse.__globals__["_parse_short"]
    for cached in (verdict._compare_cached, verdict._compare_symbolically, parse_short):
        cached.cache_clear()


def check(pairs: Sequence[Pair], moved: Sequence[Pair]) -> dict[str, int]:
    """Assert what must hold before times count; return the counts."""
    own = Counter(verify(text, gold).status for text, gold in pairs)
    other = Counter(verify(text, gold).status for text, gold in moved)
    accepted = [(t, g) for t, g in moved if verify(t, g).correct]
    equal = [pair for pair in accepted if _same_answer(*pair)]
    assert own["correct"] == len(pairs), own
    assert len(accepted) == len(equal), accepted
    counts = {f"shifted {status}": count for status, count in other.items()}
    return {"correct": own["correct"], "shifted": len(moved), **counts}


def _same_answer(text: str, gold: str) -> bool:
    """Tell a pair that differs as text only: the answer `5` for the gold `x=5`."""
    return verify(text, gold).prediction == gold.rpartition("=")[2]


def rate(pairs: Sequence[Pair], repeats: int, *, cold: bool) -> float:
    """Return verdicts per second, the best of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        if cold:
            clear_caches()
        start = time.process_time()
        for text, gold in pairs:
            verify(text, gold)
        best = min(best, time.process_time() - start)
    return len(pairs) / best


def peer() -> Callable[[str, str], bool] | None:
    """Return math-verify's check of a prediction and a gold answer, or None without it."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    import logging

    import math_verify

    logging.disable(logging.ERROR)

    def grade(text: str, gold: str) -> bool:
        target = gold if gold.startswith("$") or "boxed" in gold else f"${gold}$"
        return bool(math_verify.verify(math_verify.parse(target), math_verify.parse(text)))

    return grade


def peer_rate(grade: Callable[[str, str], bool], pairs: Sequence[Pair]) -> float:
    """Return the peer's verdicts per second in one pass."""
    start = time.process_time()
    for text, gold in pairs:
        grade(text, gold)
    return len(pairs) / (time.process_time() - start)


def test_pairs() -> list[tuple[str, str]]:
    """Return the judged pairs of the test suite, predictions in a box."""
    place = ROOT / "tests" / "rewards" / "test_verify.py"
    spec = importlib.util.spec_from_file_location("verify_cases", place)
    assert spec is not None
    assert spec.loader is not None
    cases: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    return [
        (f"${a}$", b)
        for a, b, *_ in (*cases.EQUAL, *cases.DIFFERENT, *cases.UNDECIDED)
        if a.strip() and b.strip()
    ]


def machine() -> str:
    """Return processor, core count and Python version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return (
        f"{name or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-limit", type=int, default=None, help="pairs timed with the peer")
    options = parser.parse_args()
    gsm, maths = load_pairs("gsm8k_test.jsonl"), load_pairs("math500.jsonl")
    report: dict[str, Any] = {"machine": machine()}
    for name, pairs in (("gsm8k", gsm), ("math500", maths)):
        report[f"{name} values"] = check(pairs, shifted(pairs))
    passes = {
        "gsm8k gold": gsm,
        "math500 gold": maths,
        "gsm8k gold 4KB": padded(gsm),
        "math500 gold 4KB": padded(maths),
        "gsm8k wrong 4KB": padded(shifted(gsm)),
        "math500 wrong 4KB": padded(shifted(maths)),
        "tiers 0-2 rollouts 4KB": padded(rollouts(low_tiers([*gsm, *maths]))),
    }
    report["verdicts per second"] = {
        name: {
            "cold": round(rate(pairs, options.repeats, cold=True)),
            "warm": round(rate(pairs, options.repeats, cold=False)),
        }
        for name, pairs in passes.items()
    }
    grade = peer()
    if grade is not None:
        report |= compare_with_peer(grade, passes, options)
    print(json.dumps(report, indent=1))
    (RESULTS / "verify_cpu.json").write_text(json.dumps(report, indent=1) + "\n")


def compare_with_peer(
    grade: Callable[[str, str], bool],
    passes: dict[str, list[Pair]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the peer's best rates, medians of our multiples of them, and the agreement."""
    rates, ratios = {}, {}
    for name in ("gsm8k gold", "math500 gold"):
        pairs = passes[name][: options.peer_limit]
        rounds = [
            (rate(pairs, 1, cold=True), rate(pairs, 1, cold=False), peer_rate(grade, pairs))
            for _ in range(options.repeats)
        ]
        rates[name] = round(max(theirs for _, _, theirs in rounds))
        ratios[name] = {
            "cold": round(statistics.median(cold / theirs for cold, _, theirs in rounds)),
            "warm": round(statistics.median(warm / theirs for _, warm, theirs in rounds)),
        }
    agreement, listed = {}, []
    sets = {name: passes[name] for name in ("gsm8k gold", "math500 gold")} | {
        "gsm8k wrong": shifted(passes["gsm8k gold"]),
        "math500 wrong": shifted(passes["math500 gold"]),
        "test pairs": test_pairs(),
    }
    for name, pairs in sets.items():
        tried = pairs[: options.peer_limit]
        differ = [found for pair in tried if (found := disagreement(grade, *pair)) is not None]
        listed += [{"set": name, **found} for found in differ]
        agreement[name] = f"{len(tried) - len(differ)} of {len(tried)}"
    lines = "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in listed)
    (RESULTS / "verify_disagreements.jsonl").write_text(lines, encoding="utf-8")
    return {
        "math-verify per second": rates,
        "times math-verify": ratios,
        "agreement": agreement,
        "disagreements": dict(Counter(found["judgement"] for found in listed)),
    }


def disagreement(grade: Callable[[str, str], bool], text: str, gold: str) -> dict[str, str] | None:
    """Return a pair on which the two differ (undecided counts as not correct)."""
    mine = verify(text, gold)
    theirs = grade(text, gold)
    if mine.correct == theirs:
        return None
    return {
        "answer": str(mine.prediction),
        "gold": gold,
        "ours": mine.status,
        "reason": mine.reason,
        "math_verify": "correct" if theirs else "incorrect",
        "judgement": judge(mine, theirs),
    }


def judge(mine: Any, theirs: bool) -> str:
    """Say what we make of a disagreement, by its class."""
    if mine.correct:
        return "ours is right: the answers are equal, the peer misses a notation or takes another"
    if mine.status == "incorrect":
        return "ours is right: the peer rounds, or drops a base, a unit, upper case or a mark"
    return "open: the text has two readings, which we say and the peer does not"


if __name__ == "__main__":
    main()
