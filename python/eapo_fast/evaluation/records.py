"""One line of `problems.jsonl`: what the samples of a problem came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eapo_fast.data.rows import PROBLEM_COLUMNS
from eapo_fast.engine import Vocabulary
from eapo_fast.evaluation.store import Record
from eapo_fast.evaluation.voting import answer_classes
from eapo_fast.rewards import verify
from eapo_fast.rollout import Rollout

GROUP_COLUMNS = ("level", "subject", "difficulty", "type", "steps", "year")
"""Columns by which accuracy is broken down when they have 2 to 20 values."""
_NAMES = ("id", "unique_id", "ID", "source", "problem_id")


def problem_record(
    index: int, row: Mapping[str, Any], group: Sequence[Rollout], vocabulary: Vocabulary
) -> Record:
    """Grade the samples of one problem.

    Lists have one entry per sample. Nothing of it depends on the clock, so that a continued
    evaluation writes the same bytes.
    """
    finals = [r.final_turn(vocabulary.plain_text) for r in group]
    verdicts = [verify(final, str(row["answer"])) for final in finals]
    answers = [v.prediction for v in verdicts]
    record: Record = {
        "index": index,
        "id": next((row[name] for name in _NAMES if row.get(name) is not None), None),
        "gold": str(row["answer"]),
        "correct": [int(v.correct) for v in verdicts],
        "undecided": [int(v.status == "undecided") for v in verdicts],
        "answers": answers,
        "classes": answer_classes(answers),
        "tokens": [r.num_policy_tokens for r in group],
        "finish": [r.finish_reason for r in group],
    }
    record |= {name: row[name] for name in GROUP_COLUMNS if _is_label(row.get(name))}
    if any(r.num_turns > 1 for r in group):
        record["consults"] = [_consults(r) for r in group]
    record |= _question(row)
    record["texts"] = [vocabulary.plain_text(r.token_ids.tolist()) for r in group]
    return record


def _question(row: Mapping[str, Any]) -> Record:
    """Return the problem under the kind of column that it came in: the kind decides its format."""
    prompt = row["prompt"]
    is_problem = any(row.get(column) == prompt for column in PROBLEM_COLUMNS)
    return {"problem" if is_problem else "prompt": prompt}


def _consults(rollout: Rollout) -> dict[str, Any]:
    """Consults of one sample; blocks include malformed ones."""
    return {
        "blocks": rollout.num_turns - 1,
        "asked": len(rollout.consults),
        "accepted": sum(r.accepted for r in rollout.consults),
        "statuses": dict(Counter(r.status for r in rollout.consults)),
        "reply_tokens": len(rollout.ids(("expert",))),
    }


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
