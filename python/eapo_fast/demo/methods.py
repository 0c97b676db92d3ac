"""The paper's comparison rows on the demo: `python -m eapo_fast.demo.methods`.

    base model | expert-assisted workflow | distillation | self-exploratory RL | EAPO

All are measured on the demo's held-apart problems with `eapo-fast eval`. What is finished is not
repeated. The demo's expert is a calculator, which cannot write solutions: distillation imitates the
exact teacher instead, which knows every step, so that row shows what copying whole solutions gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eapo_fast.demo import POLICY, settings
from eapo_fast.demo.chains import keyed_generator, load_chains, resample
from eapo_fast.demo.problems import MAX_VALUE, build_dataset, problem_of
from eapo_fast.demo.teacher import Habits, Teacher

SAMPLES = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Train, distil, measure and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eapo_fast.demo.methods", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each method")
    parser.add_argument("--n", type=int, default=SAMPLES, help="samples per problem")
    parser.add_argument("--limit", type=int, default=None, help="first test problems only")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--report", type=Path, default=Path("docs/results/methods"))
    options = parser.parse_args(argv)
    print(f"written: {run(options)}")
    return 0


def run(options: argparse.Namespace) -> Path:
    """Make the four models, measure the five rows and return the page's path."""
    from eapo_fast.demo import compare
    from eapo_fast.evaluation.table import write_table

    seed, out = options.seed, options.out
    for side in ("alone", "eapo"):
        compare.run(side, seed, options.steps, out)
    models = {
        "base": POLICY,
        "workflow": POLICY,
        "distillation": distilled(out / f"distilled-{seed}", seed, options.steps),
        "self-exploratory": out / f"alone-{seed}" / "final",
        "eapo": out / f"eapo-{seed}" / "final",
    }
    problems = test_file(out)
    folders = [
        measure(method, model, problems, out / f"eval-{method}-{seed}", options)
        for method, model in models.items()
    ]
    return write_table(folders, options.report)


def measure(
    method: str, model: Path, problems: Path, folder: Path, options: argparse.Namespace
) -> Path:
    """Evaluate one row as the demo samples: temperature 1, no consult paragraph."""
    from eapo_fast.evaluation import EvalSettings, evaluate_model
    from eapo_fast.experts import Calculator

    chosen = EvalSettings(
        method=method,
        n=options.n,
        limit=options.limit,
        temperature=1.0,
        top_p=1.0,
        max_tokens=settings.CONFIG["max_completion_length"],
        consult_prompt="",
    )
    expert = Calculator() if method == "workflow" else None
    evaluate_model(str(model), problems, folder, chosen, expert=expert)
    return folder


def distilled(folder: Path, seed: int, steps: int | None) -> Path:
    """Fine-tune the policy with LoRA on exact solutions of train problems; returns its model."""
    from eapo_fast.distillation import DistillSettings, distill

    chosen = DistillSettings(
        lora=16,
        max_steps=steps or settings.CONFIG["max_steps"],
        batch_size=settings.CONFIG["per_device_train_batch_size"] // 8,
        learning_rate=1e-3,
        seed=seed,
    )
    return Path(distill(str(POLICY), solutions(seed), folder, chosen)["final"])


def solutions(seed: int) -> list[dict[str, Any]]:
    """Return resampled train chains of the demo's lengths with the exact teacher's text."""
    least, most = settings.TRAIN_STEPS
    sources = [c for c in load_chains("train") if least <= len(c.steps) <= most]
    held_apart = {chain.figures for chain in load_chains("test")}
    rows: list[dict[str, Any]] = []
    for index in range(settings.TRAIN_SIZE):
        rng = keyed_generator(seed, index)
        chain = resample(sources[int(rng.integers(len(sources)))], rng, max_value=MAX_VALUE)
        if chain is not None and chain.figures not in held_apart:
            pieces = Teacher(chain, Habits(), rng).write()
            rows.append({**problem_of(chain), "solution": "".join(p.text for p in pieces)})
    return rows


def test_file(out: Path) -> Path:
    """Write the held-apart problems as JSONL; returns the path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "held-apart.jsonl"
    rows = build_dataset("test", settings.EVAL_SIZE, settings.EVAL_SEED, steps=settings.EVAL_STEPS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
