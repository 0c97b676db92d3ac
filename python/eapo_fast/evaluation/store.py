"""The folder of an evaluation: written chunk by chunk, so that an interrupted one can go on.

`problems.jsonl` holds one line per problem, in order. A chunk is appended in one piece and synced
before the next begins; what a crash tore off is dropped on reopening, back to whole chunks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.evaluation.folder import IDENTITY, claim, read_json, write_json

Record = dict[str, Any]
PROBLEMS, TIMING, RESULT = "problems.jsonl", "timing.jsonl", "evaluation.json"
PICTURE = "evaluation.png"
_TEXTS = ("texts", "problem", "prompt")
_OWN = (PROBLEMS, TIMING, RESULT, PICTURE)


class Store:
    """Opens the folder, for one process at a time, and appends to it.

    `records` are the problems so far without their texts, `timing` the lines of the clock.

    Args:
        folder: made if it is not there.
        identity: what decides the result, see `settings.identity`.
        chunk: problems of a whole chunk.
        restart: set an earlier evaluation aside (as `<folder>/old`) instead of continuing it.

    Raises:
        ConfigError: it holds an evaluation of something else, is in use or cannot be written.
        DataError: its files were changed by hand.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], chunk: int, *, restart: bool = False
    ) -> None:
        self.folder = folder
        self._lock = claim(folder, identity, _OWN, "evaluation", restart=restart)
        try:
            self.records = _whole_chunks(folder / PROBLEMS, chunk, int(identity["problems"]))
            done = len(self.records)
            self.timing = [t for t in read_lines(folder / TIMING) if t["first"] < done]
            _truncate(folder / TIMING, len(self.timing))
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def append(self, records: Sequence[Record], timing: Record) -> None:
        """Add a finished chunk; it is on disk when this returns."""
        _append(self.folder / PROBLEMS, records)
        _append(self.folder / TIMING, [timing])
        self.records += map(_light, records)
        self.timing.append(timing)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, whole or not at all."""
        write_json(self.folder / RESULT, result)


def read_lines(path: Path, *, texts: bool = True) -> list[Record]:
    """Return the whole lines of a JSONL file; [] if there is no file. A torn end is left out.

    `texts=False` leaves out what the samples say, which is nearly all of a large file.
    """
    if not path.is_file():
        return []
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            record = _parsed(line, f"{path}:{number}")
            records.append(record if texts else _light(record))
    return records


def _parsed(line: bytes, place: str) -> Record:
    try:
        record: Record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{place}: not a JSON object ({error}); the file was changed, begin anew (--restart)"
        ) from error
    return record


def _light(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in _TEXTS}


def read_result(folder: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """Return result and problems of a finished evaluation.

    Raises:
        ConfigError: the folder holds none.
        DataError: its files do not belong together.
    """
    path = Path(folder) / RESULT
    if not path.is_file():
        unfinished = (Path(folder) / IDENTITY).is_file()
        state = "an unfinished evaluation; repeat its command" if unfinished else "no evaluation"
        raise ConfigError(f"{folder} holds {state}")
    result, records = read_json(path), read_lines(Path(folder) / PROBLEMS)
    expected = result["results"]["problems"]
    if [r.get("index") for r in records] != list(range(expected)):
        raise DataError(
            f"{Path(folder) / PROBLEMS}: got {len(records)} problems, {RESULT} has {expected}; the "
            "file was changed"
        )
    return result, records


def _whole_chunks(path: Path, chunk: int, problems: int) -> list[Record]:
    records = read_lines(path, texts=False)
    whole = len(records) if len(records) == problems else len(records) // chunk * chunk
    if [r.get("index") for r in records] != list(range(len(records))) or whole > problems:
        raise DataError(
            f"{path}: the problems are not in order; the file was changed, begin anew (--restart)"
        )
    _truncate(path, whole)
    return records[:whole]


def _truncate(path: Path, lines: int) -> None:
    """Cut a file behind its first `lines` lines."""
    if path.is_file():
        with path.open("rb") as file:
            size = sum(len(line) for line in islice(file, lines))
        os.truncate(path, size)


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    """Return one line; half of a surrogate pair, which UTF-8 has no bytes for, stays escaped."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
