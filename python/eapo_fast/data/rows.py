"""Rows of a data set: from a JSONL file, a list of dicts or a `datasets.Dataset`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eapo_fast.errors import DataError, suggest
from eapo_fast.rewards import extract_gold, readable

Row = dict[str, Any]

PROBLEM_COLUMNS = ("problem", "question")
"""Columns that become the prompt when there is no `prompt`."""
PROMPT_COLUMNS = ("prompt", *PROBLEM_COLUMNS)
_READ_COLUMNS = (*PROMPT_COLUMNS, "answer", "solution")
_SHOWN = 5


def load_dataset(source: Any, *, name: str = "train_dataset") -> list[Row]:
    """Read a data set into rows that all have a `prompt`, and an `answer` where it can be found.

    A `problem` or `question` is copied to `prompt`; names may be capitalised (`Problem`). The
    reference answer is taken from `answer`, else from `solution`; what follows `####` or stands in
    the last box is kept as `answer`, and a worked-out `answer` moves to `solution`. Other columns
    are kept as they are.

    Args:
        source: Path of a JSONL file (one object a line), a list of dicts, or a `datasets.Dataset`
            (anything that yields mappings).
        name: What the error messages call it.

    Raises:
        DataError: The file is missing or a line of it unreadable, there are no rows, a row is no
            mapping or has no prompt.
    """
    if isinstance(source, (str, Path)):
        rows = _read_jsonl(Path(source), name)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"{name}: got {type(source).__name__}, allowed is a JSONL path, a list of dicts or a "
            "datasets.Dataset (of a DatasetDict pick one split)"
        )
    else:
        rows = [_checked(row, f"{name}[{index}]") for index, row in enumerate(source)]
    if not rows:
        raise DataError(f"{name}: there are no rows in {_described(source)}")
    return [_completed(row, f"{name}[{index}]") for index, row in enumerate(rows)]


def require_column(rows: Sequence[Mapping[str, Any]], column: str, *, needed_by: str) -> None:
    """Check that every row has a value in a column.

    Args:
        rows: Rows of `load_dataset`.
        column: Name of the column.
        needed_by: Who needs it, for the message.

    Raises:
        DataError: Rows without it; the message lists their numbers or the columns there are.
    """
    missing = [index for index, row in enumerate(rows) if row.get(column) in (None, "")]
    if not missing:
        return
    if len(missing) == len(rows):
        found = _columns(rows)
        hint = suggest(column, found)
        raise DataError(
            f"{needed_by} needs a column {column!r}; the columns are {', '.join(found)}.{hint}"
        )
    shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    raise DataError(
        f"{needed_by} needs a value in column {column!r}; {len(missing)} of {len(rows)} rows have "
        f"none (rows {shown}, counted from 0)"
    )


def check_golds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each reference answer that cannot be compared; [] if all can.

    A policy's answer to such a row is `correct` only when it repeats the text, else `undecided`.
    """
    problems = []
    for index, row in enumerate(rows):
        answer = row.get("answer")
        reason = "no answer" if answer in (None, "") else readable(str(answer))
        if reason is not None:
            problems.append(f"row {index}: answer {answer!r} cannot be read: {reason}")
    return problems


def _read_jsonl(path: Path, name: str) -> list[Row]:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{name}: {path} {kind}; a JSONL file (one object a line) is needed")
    rows = []
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{path}:{number}"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return rows


def _parse_line(line: str, place: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object: {error}") from error
    return _checked(value, place)


def _checked(row: Any, place: str) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: got {type(row).__name__}, a row is an object with columns")
    return dict(row)


def _completed(row: Row, place: str) -> Row:
    for name in list(row):
        if isinstance(name, str) and name.lower() in _READ_COLUMNS:
            row.setdefault(name.lower(), row[name])
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        hints = (suggest(found, PROMPT_COLUMNS) for found in row)
        raise DataError(
            f"{place}: no column 'prompt', 'problem' or 'question'; the columns are "
            f"{', '.join(map(str, row)) or 'none'}.{next(filter(None, hints), '')}"
        )
    row["prompt"] = _checked_prompt(row[column], f"{place}.{column}")
    return _with_answer(row)


def _checked_prompt(prompt: Any, place: str) -> Any:
    if isinstance(prompt, str) and prompt.strip():
        return _whole_characters(prompt, place)
    if isinstance(prompt, Sequence) and prompt and not isinstance(prompt, (str, bytes)):
        if all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt):
            for message in prompt:
                _whole_characters(str(message["content"]), place)
            return [dict(message) for message in prompt]
        raise DataError(f"{place}: every message needs a 'role' and a 'content'")
    raise DataError(
        f"{place}: got {prompt!r}, allowed is text or a list of messages with role and content"
    )


def _whole_characters(text: str, place: str) -> str:
    """Return a text that a tokenizer can take: halves of surrogate pairs are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half of a surrogate pair at character {error.start}; a text must be Unicode"
        ) from error
    return text


def _with_answer(row: Row) -> Row:
    given = row.get("answer")
    if given == "" or (isinstance(given, float) and not math.isfinite(given)):
        given = row["answer"] = None  # tables write NaN where a value is missing
    source = given if given is not None else row.get("solution")
    if not isinstance(source, str):
        if given is not None:
            row["answer"] = str(given)
        return row
    marked = "####" in source or "\\boxed" in source or "\\fbox" in source
    if marked:
        row["answer"] = extract_gold(source)
        if given is not None and row["answer"] != given.strip():
            row.setdefault("solution", given)
    return row


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _described(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
