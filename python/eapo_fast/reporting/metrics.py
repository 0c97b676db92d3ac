"""`metrics.jsonl`: one JSON object a line, flushed as it is written, readable after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from eapo_fast.errors import DataError

Row = dict[str, Any]
"""One logging event: `step` first, then metric names (numbers, strings or `None`)."""

NOT_FINITE = "not_finite"
"""Key that keeps the names of values JSON cannot hold: `{"loss": "nan"}` beside `"loss": null`."""


class MetricsLog:
    """Appends logging events to a JSON-lines file.

    `resume_step=None` starts a new log; a file that is already there is kept as `<name>.old`.
    `resume_step=s` continues one: a line torn by a crash and every line of a step after `s` are
    dropped, so that the steps which run again are not logged twice.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if resume_step is None:
                self.path.replace(self.path.with_name(self.path.name + ".old"))
            else:
                _drop_after(self.path, resume_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, metrics: Mapping[str, Any]) -> Row:
        """Append one event and flush it; returns the row as it stands in the file.

        Scalars of numpy or torch are taken by their `item()`. NaN and infinities become `null`,
        and `not_finite` says which they were.
        """
        row = to_row(step, metrics)
        self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        return row

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def to_row(step: int, metrics: Mapping[str, Any]) -> Row:
    """The JSON-able row for `metrics`: `step` first, plain numbers, no NaN."""
    row: Row = {"step": int(step)}
    odd: dict[str, str] = {}
    for name, value in metrics.items():
        if name == "step":
            continue
        row[name] = plain = _plain(value)
        if isinstance(plain, float) and not math.isfinite(plain):
            row[name], odd[name] = None, str(plain)
    if odd:
        row[NOT_FINITE] = odd
    return row


def read_jsonl(path: str | Path) -> list[Row]:
    """Objects of a JSON-lines file; a last line that was torn by a crash is left out.

    Raises `DataError` with the line number when any other line is not a JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a JSON object ({error})") from error
        rows.append(row)
    return rows


def series(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in file order, without the gaps."""
    steps: list[int] = []
    values: list[float] = []
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float):
            steps.append(int(row["step"]))
            values.append(float(value))
    return steps, values


def _drop_after(path: Path, step: int) -> None:
    kept = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return float(value)
