"""Write `chains_train.json` and `chains_test.json`: `python -m eapo_fast.demo.extract_chains`.

Needs `gsm8k_train_200.jsonl` and `gsm8k_test.jsonl` (rows with `id`, `solution`, `answer`). Only
figures are kept: expressions, links, results and the id of the problem; never its text.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from eapo_fast.demo.chains import Chain, iter_rows, read_solution

SOURCES = {"train": "gsm8k_train_200.jsonl", "test": "gsm8k_test.jsonl"}
ORIGIN = {
    "source": "GSM8K calculator annotations, https://github.com/openai/grade-school-math",
    "commit": "3101c7d",
    "licence": "MIT, Copyright (c) 2021 OpenAI",
    "contents": "figures only: binary integer steps (a = first result), exact results, problem ids",
}
MAX_VALUE = 9999


def extract(path: Path) -> list[Chain]:
    """Return the chains of one JSONL file, in its order."""
    with path.open(encoding="utf-8") as lines:
        chains = [
            read_solution(row["id"], row["solution"], row["answer"], max_value=MAX_VALUE)
            for row in iter_rows(lines)
        ]
    return [chain for chain in chains if chain is not None]


def render(split: str, chains: list[Chain]) -> str:
    """Return the JSON text: a header, then one chain a line."""
    counts = Counter(len(chain.steps) for chain in chains)
    header: dict[str, Any] = {
        **ORIGIN,
        "split": split,
        "max_value": MAX_VALUE,
        "chains_by_steps": {str(steps): counts[steps] for steps in sorted(counts)},
    }
    rows = ",\n".join(json.dumps(chain.to_json(), separators=(",", ":")) for chain in chains)
    return json.dumps(header, indent=1)[:-2] + f',\n "chains": [\n{rows}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    """Read `--data`, write both files beside this module (or under `--out`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the GSM8K JSONL")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    for split, name in SOURCES.items():
        chains = extract(args.data / name)
        target = args.out / f"chains_{split}.json"
        target.write_text(render(split, chains), encoding="utf-8")
        print(f"{target}: {len(chains)} chains")


if __name__ == "__main__":
    main()
