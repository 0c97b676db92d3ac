"""A fabricated run directory with everything the reporting code reads, awkward text included."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.reporting.metrics import MetricsLog
from eapo_fast.reporting.stats import wilson

HOSTILE = "</script><script>alert('gold')</script> <img src=x onerror=alert(1)> & \"q\" 'q'"
UNICODE = "caf\u00e9 \u2264 \u03c0 \u4e09\u5341 \U0001f600 \u202e"


def evaluation(step: int, correct: int, n: int) -> dict[str, Any]:
    low, high = wilson(correct, n)
    return {
        "eval_solo_accuracy": correct / n,
        "eval_solo_accuracy_low": low,
        "eval_solo_accuracy_high": high,
        "eval_solo_n": n,
    }


def train_metrics(step: int, total: int, rng: random.Random) -> dict[str, Any]:
    rho = min(1.0, 8 / step)
    rate = max(0.02, 2.4 * math.exp(-3 * step / total) + rng.gauss(0, 0.08))
    asked = round(rate * 128)
    accepted = round(asked * min(1.0, max(0.0, rho + rng.gauss(0, 0.04))))
    return {
        "reward": max(0.0, 0.05 + 0.5 * (1 - math.exp(-3 * step / total)) + rng.gauss(0, 0.05)),
        "reward_std": 0.2,
        "expert/consult_rate": rate,
        "expert/acceptance": rho,
        "expert/accepted_share": accepted / max(1, asked),
        "expert/asked": asked,
        "expert/sent": accepted,
        "expert/saved_by_gate": asked - accepted,
        "expert/ok": accepted,
        "expert/declined": asked - accepted,
        "perf/step_s": 1.3,
        "perf/rollout_s": 0.8,
        "perf/reward_s": 0.02,
        "perf/update_s": 0.45,
        "perf/tokens_per_s": 5200 + rng.gauss(0, 300),
    }


def rollout(step: int, group: int, sample: int, rng: random.Random) -> dict[str, Any]:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    query, value, right = f"{a}*{b}", a * b, rng.random() < 0.4
    help_given = rng.random() < 0.6
    final = value - c if right else value + c
    segments = [
        {"kind": "policy", "turn": 0, "tokens": 21,
         "text": f"{a}*{b}: <consult><q>{query}</q></consult>"},
        {"kind": "expert" if help_given else "notice", "turn": 0, "tokens": 9,
         "text": f"<advice>{value}</advice>" if help_given else "<advice>no advice</advice>"},
        {"kind": "policy", "turn": 1, "tokens": 17,
         "text": f"={value}\n{value}-{c}={final}\n#### {final}"},
    ]  # fmt: skip
    consults = [
        {"query": query, "status": "ok" if help_given else "declined", "turn": 0, "index": 0,
         "text": str(value) if help_given else "", "latency": 0.0004}
    ]  # fmt: skip
    return {
        "step": step, "split": "train", "prompt_index": group * 7, "group": group, "sample": sample,
        "prompt": f"Compute {a}*{b}-{c}.", "answer": str(value - c), "reward": float(right),
        "rewards": {"accuracy": float(right), "format": 0.1}, "advantage": 0.7 if right else -0.5,
        "accuracy": float(right), "finish_reason": "stop" if rng.random() < 0.9 else "length",
        "segments": segments, "consults": consults,
    }  # fmt: skip


def hostile_rollout(step: int) -> dict[str, Any]:
    return {
        **rollout(step, 99, 0, random.Random(1)),
        "prompt": HOSTILE,
        "answer": UNICODE,
        "accuracy": None,
        "segments": [
            {"kind": "policy", "turn": 0, "text": HOSTILE, "tokens": 3},
            {"kind": "expert", "turn": 0, "text": UNICODE + HOSTILE, "tokens": 3},
        ],
        "consults": [
            {
                "query": HOSTILE,
                "status": "ok",
                "text": UNICODE,
                "latency": 0.2,
                "turn": 0,
                "index": 0,
            }
        ],
    }


def fabricate(run: Path, *, steps: int = 40, expert: bool = True, summary: bool = True) -> Path:
    """Write metrics, rollouts and (optionally) a summary under `run`; return `run`."""
    rng = random.Random(7)
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.write(0, evaluation(0, 8, 200))
        for step in range(1, steps + 1):
            metrics = train_metrics(step, steps, rng)
            if not expert:
                metrics = {k: v for k, v in metrics.items() if not k.startswith("expert/")}
            log.write(step, metrics)
            if step % 10 == 0:
                log.write(step, evaluation(step, 8 + round(60 * step / steps), 200))
    for step in range(10, steps + 1, 10):
        rows = [rollout(step, g, s, rng) for g in range(3) for s in range(4)]
        rows.append(hostile_rollout(step))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")
    if summary:
        (run / "summary.json").write_text(json.dumps(summary_of(run, steps)), encoding="utf-8")
    return run


def summary_of(run: Path, steps: int) -> dict[str, Any]:
    before, after = wilson(8, 200), wilson(68, 200)
    return {
        "solo_before": {"accuracy": 0.04, "low": before[0], "high": before[1], "n": 200},
        "solo_after": {"accuracy": 0.34, "low": after[0], "high": after[1], "n": 200},
        "consults": {
            "asked": 1552, "sent": 312, "accepted": 312, "saved_by_gate": 1240,
            "by_status": {"ok": 312, "declined": 1240},
        },
        "seconds": {
            "setup": 4.2, "rollout": 118.0, "reward": 2.1, "update": 71.0, "evaluation": 22.0,
            "other": 1.4, "total": 218.7,
        },
        "steps": steps, "run_dir": str(run), "model": "tiny <qwen2>", "recipe": "eapo", "seed": 0,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", **options: Any) -> Path:
        return fabricate(tmp_path / name, **options)

    return make
