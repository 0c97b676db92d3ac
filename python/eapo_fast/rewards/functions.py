"""Reward functions in TRL's form: keywords only, one float or None per completion.

Each reads `completions` (strings or lists of messages) or, when the trainer passes it,
`final_turns` (the policy's own text after the last injected segment), and the reference from the
column `answer` or `solution`. The name of a function becomes its metric name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.rewards.extract import METHODS, boxed, extract_answer
from eapo_fast.rewards.verdict import Verdict, verify

Rewards = list[float | None]

WELL_FORMED = 0.1
"""Reward of a wrong answer in a well-formed box (EAPO, arXiv 2509.23730; `R = 0.1`)."""


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion: a string, or the last assistant message of a list."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            return _content_text(message.get("content"))
    return ""


def policy_texts(
    completions: Sequence[str | Sequence[Mapping[str, Any]]],
    final_turns: Sequence[str] | None = None,
) -> list[str]:
    """Return the texts an answer is looked for in: final turns when given, else completions."""
    if final_turns is not None:
        return list(final_turns)
    return [completion_text(completion) for completion in completions]


def gold_answers(columns: Mapping[str, Any], count: int, needed_by: str) -> list[str | None]:
    """Return one reference per completion from `answer`, else `solution`; None where it is empty.

    Raises:
        DataError: Neither column is there.
    """
    for name in ("answer", "solution"):
        values = columns.get(name)
        if values is not None:
            return [None if value is None else str(value) for value in values]
    found = sorted(set(columns) - {"prompts", "completions", "completion_ids"})
    raise DataError(
        f"reward {needed_by!r} needs a column 'answer' or 'solution' for {count} completions; "
        f"got {', '.join(found) or 'no columns'}"
    )


class Accuracy:
    """1 for a correct answer, 0 for a wrong one; None (no signal) for a row without reference.

    Called with `log_metric`, it reports the share of checks that came out undecided.
    """

    __name__ = "accuracy"

    def __init__(self, *, undecided: float | None = 0.0, extract: str = "auto") -> None:
        """
        Args:
            undecided: Reward of an answer that could not be decided; None masks the row.
            extract: How to find the answer, see `rewards.extract_answer`.
        """
        if extract not in METHODS:
            raise ConfigError(f"extract: got {extract!r}, allowed is one of {', '.join(METHODS)}")
        self.undecided = undecided
        self.extract = extract

    def __repr__(self) -> str:
        return f"Accuracy(undecided={self.undecided!r}, extract={self.extract!r})"

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> Rewards:
        texts = policy_texts(completions, columns.get("final_turns"))
        golds = gold_answers(columns, len(texts), "accuracy")
        verdicts = _verdicts(texts, golds, self.extract)
        _log_undecided(verdicts, columns.get("log_metric"))
        return [self._reward(verdict) for verdict in verdicts]

    def _reward(self, verdict: Verdict | None) -> float | None:
        if verdict is None:
            return None
        return self.undecided if verdict.status == "undecided" else float(verdict.correct)


class Exact:
    """EAPO's reward for mathematics: 1 if correct, `WELL_FORMED` for a well-formed box, else 0.

    None for a row without reference. Dynamic sampling should filter on `accuracy`, not on this: in
    an all-wrong group the 0.1 alone makes the rewards differ, and normalised advantages would blow
    that up to unit size.
    """

    __name__ = "exact"

    def __init__(self, *, undecided: float | Literal["wrong"] | None = "wrong") -> None:
        """
        Args:
            undecided: Reward of an answer that could not be decided: `wrong` treats it as a wrong
                one, None masks the row.
        """
        self.undecided = undecided

    def __repr__(self) -> str:
        return f"Exact(undecided={self.undecided!r})"

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> Rewards:
        texts = policy_texts(completions, columns.get("final_turns"))
        golds = gold_answers(columns, len(texts), "exact")
        verdicts = _verdicts(texts, golds, "auto")
        return [self._reward(text, v) for text, v in zip(texts, verdicts, strict=True)]

    def _reward(self, text: str, verdict: Verdict | None) -> float | None:
        if verdict is None:
            return None
        if verdict.status == "undecided" and self.undecided != "wrong":
            return self.undecided
        return 1.0 if verdict.correct else WELL_FORMED * is_well_formed(text)


_ACCURACY, _EXACT = Accuracy(), Exact()


def accuracy(*, completions: Sequence[Any], **columns: Any) -> Rewards:
    """1 for a correct answer, else 0 (undecided ones too); None for a row without reference."""
    return _ACCURACY(completions=completions, **columns)


def format(*, completions: Sequence[Any], **columns: Any) -> Rewards:
    """1 if the final turn ends in a well-formed `\\boxed{...}` that is not empty, else 0."""
    texts = policy_texts(completions, columns.get("final_turns"))
    return [float(is_well_formed(text)) for text in texts]


def is_well_formed(text: str) -> bool:
    """Tell whether a text holds a closed box with something in it."""
    content = boxed(text)
    return content is not None and bool(content.strip())


def exact(*, completions: Sequence[Any], **columns: Any) -> Rewards:
    """1 for a correct answer, 0.1 for another one in a well-formed box, else 0; see `Exact`."""
    return _EXACT(completions=completions, **columns)


def answer_of(text: str) -> str:
    """Return the extracted answer of a completion, or ""; for tables and reports."""
    return extract_answer(text) or ""


def _verdicts(
    texts: Sequence[str], golds: Sequence[str | None], extract: str
) -> list[Verdict | None]:
    """Check each text once per distinct pair."""
    known: dict[tuple[str, str], Verdict] = {}
    verdicts: list[Verdict | None] = []
    for text, gold in zip(texts, golds, strict=True):
        if gold is None or not gold.strip():
            verdicts.append(None)
            continue
        if (text, gold) not in known:
            known[text, gold] = verify(text, gold, extract=extract)
        verdicts.append(known[text, gold])
    return verdicts


def _log_undecided(verdicts: Sequence[Verdict | None], log_metric: Any) -> None:
    checked = [verdict for verdict in verdicts if verdict is not None]
    if log_metric is not None and checked:
        share = sum(verdict.status == "undecided" for verdict in checked) / len(checked)
        log_metric("accuracy/undecided", share)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""
