"""Expert solutions: where they come from, which are kept, how they become tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eapo_fast.data import encode_prompts, load_dataset
from eapo_fast.data.rows import PROMPT_COLUMNS
from eapo_fast.engine import Vocabulary
from eapo_fast.errors import ConfigError, DataError
from eapo_fast.evaluation.store import RESULT, Record, read_result
from eapo_fast.rewards import verify
from eapo_fast.rewards.extract import after_mark, boxed
from eapo_fast.rollout import Rollout, Segment

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Solution:
    """A problem and a text to imitate."""

    row: Mapping[str, Any]
    """The problem, as `load_dataset` gives it."""
    text: str
    """The solution with its final answer."""


def load_solutions(data: Any) -> list[Solution]:
    """Read solutions.

    Args:
        data: JSONL file (list of dicts, `datasets.Dataset`) with a `solution` column, or an
            `answer` that is worked out; or the folder of a finished solo evaluation: the correct
            samples of each problem, each text once, are solutions of the model measured there.

    A solution that shows neither a box nor `####` gets its `answer` in a box at the end, so that
    the student learns to give one. A solution whose answer is not the row's is left out, with a
    warning that lists it.

    Raises:
        DataError: no solution is left; rows have none.
        ConfigError: the folder holds no finished solo evaluation.
    """
    if isinstance(data, (str, Path)) and Path(data).is_dir():
        return _sampled(Path(data))
    rows = load_dataset(data, name="data")
    missing = [i for i, row in enumerate(rows) if not _text(row)]
    if missing:
        raise DataError(
            f"data: {len(missing)} of {len(rows)} rows have no solution (rows {missing[:5]}, "
            f"counted from 0); distillation needs a column 'solution', or the folder of an "
            f"evaluation of the expert"
        )
    wrong = [i for i, row in enumerate(rows) if _contradicts(row)]
    if wrong:
        listed = "\n  ".join(f"row {i}: answer {rows[i]['answer']!r}" for i in wrong[:_SHOWN])
        more = f"\n  and {len(wrong) - _SHOWN} more" * (len(wrong) > _SHOWN)
        warnings.warn(
            f"data: {len(wrong)} of {len(rows)} solutions end in another answer than their row's "
            f"and are left out:\n  {listed}{more}",
            stacklevel=2,
        )
    left_out = set(wrong)
    kept = [Solution(row, _text(row)) for i, row in enumerate(rows) if i not in left_out]
    if not kept:
        raise DataError("data: no solution is left")
    return kept


def prepare(
    solutions: Sequence[Solution],
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    system: str | None = None,
    max_length: int,
) -> list[Rollout]:
    """Tokenise solutions into rollouts: the prompt as in evaluation, then solution and EOS.

    Whatever a solution says, it holds no control token but the EOS at its end. Pairs longer than
    `max_length` tokens are left out, with a warning.

    Raises:
        DataError: none is short enough.
    """
    prompts = encode_prompts([s.row for s in solutions], tokenizer, system=system)
    pairs = [
        (prompt, [*vocabulary.encode_foreign(s.text), tokenizer.eos_token_id])
        for prompt, s in zip(prompts, solutions, strict=True)
    ]
    kept = [(p, t) for p, t in pairs if len(p) + len(t) <= max_length]
    if not kept:
        shortest = min(len(p) + len(t) for p, t in pairs)
        raise DataError(
            f"max_length {max_length}: the shortest prompt with its solution has {shortest} tokens"
        )
    if len(kept) < len(pairs):
        warnings.warn(
            f"data: {len(pairs) - len(kept)} of {len(pairs)} solutions are longer than max_length "
            f"{max_length} with their prompts and are left out",
            stacklevel=3,
        )
    return [_rollout(index, prompt, tokens) for index, (prompt, tokens) in enumerate(kept)]


def _rollout(index: int, prompt: list[int], tokens: list[int]) -> Rollout:
    none = np.empty(0, dtype=np.int32)
    return Rollout(
        prompt_ids=prompt,
        token_ids=np.array(tokens, dtype=np.int64),
        loss_mask=np.ones(len(tokens), dtype=np.uint8),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        segments=[Segment("policy", 0, len(tokens), 0)],
        finish_reason="stop",
        group_id=index,
        sample_index=0,
        prompt_id=index,
        banned=(none, none),
    )


def _sampled(folder: Path) -> list[Solution]:
    if not (folder / RESULT).is_file():
        raise ConfigError(
            f"data: {folder} holds no {RESULT}; give a JSONL file, or the folder of a finished "
            f"evaluation of the expert"
        )
    result, records = read_result(folder)
    if result["kind"] != "solo":
        raise ConfigError(
            f"data: {folder} is an assisted evaluation, whose texts hold advice; measure the "
            f"expert alone"
        )
    found = [Solution(_row(r), text) for r in records for text in _correct_texts(r)]
    if not found:
        raise DataError(f"data: {folder} holds no correct sample")
    return found


def _row(record: Record) -> dict[str, Any]:
    return {name: record[name] for name in PROMPT_COLUMNS if name in record} | {
        "prompt": record.get("prompt", record.get("problem")),
        "answer": record["gold"],
    }


def _correct_texts(record: Record) -> list[str]:
    pairs = zip(record["texts"], record["correct"], strict=True)
    return list(dict.fromkeys(text for text, correct in pairs if correct and text.strip()))


def _text(row: Mapping[str, Any]) -> str:
    """Return the solution with a final answer; "" if there is none."""
    solution = str(row.get("solution") or "").rstrip()
    if not solution or _shows_answer(solution) or row.get("answer") in (None, ""):
        return solution
    return f"{solution}\n\\boxed{{{row['answer']}}}"


def _shows_answer(solution: str) -> bool:
    return boxed(solution) is not None or after_mark(solution) is not None


def _contradicts(row: Mapping[str, Any]) -> bool:
    """Whether the solution certainly ends in another answer than the row's."""
    answer = row.get("answer")
    if answer in (None, ""):
        return False
    return verify(_text(row), str(answer)).status == "incorrect"
