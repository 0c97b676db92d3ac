"""Record consults as JSON lines, and an expert that replays such a file.

A recording has two kinds of content, each line with its checksum: what every consult was answered
(`"kind": "consult"`), and the engine steps at which replies joined their rows (`"begin"` opens a
collection of rollouts, `"tick"` is one step of it; `experts.tape`). Where a place was recorded
twice, as after a crash, the later lines count. Lines are numbered from 1 (`"n"`), so that one that
is missing, moved or put in is noticed, not only one that was changed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.experts.base import (
    STATUSES,
    ConsultRequest,
    ExpertReply,
    ReplayMismatch,
)
from eapo_fast.experts.cache import reply_to_json, text_or_none, usage_from_json
from eapo_fast.experts.lines import sealed, unsealed
from eapo_fast.experts.tape import ReplayingTape, Tape

Place = tuple[int, ...]
Content = tuple[str, str, int]


class Recorder:
    """Appends one JSON line per consult; a line is on its way to disk before the result is out."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._lock = threading.Lock()
        self._path = Path(path)
        self._lines: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            end_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"expert record {str(path)!r} cannot be written ({error.strerror}); "
                "name a writable file or drop the setting."
            ) from None

    def write(self, request: ConsultRequest, reply: ExpertReply) -> None:
        """Append the line of one consult."""
        self.write_line(record_line(request, reply))

    def write_line(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self._lock:
            if self._lines is None:
                self._lines = _count_lines(self._path)
            self._file.write(sealed({"n": self._lines + 1, **line}) + "\n")
            self._file.flush()
            self._lines += 1

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def record_line(request: ConsultRequest, reply: ExpertReply) -> dict[str, Any]:
    """What a recording holds about one consult."""
    return {
        "kind": "consult",
        "query": request.query,
        "problem": request.problem,
        "sample_index": request.sample_index,
        "place": [*request.place],
        "status": reply.status,
        "unfit": reply.unfit,
        **reply_to_json(reply),
    }


def end_torn_line(path: Path) -> None:
    """Cut an unfinished last line off, so that what is appended starts on a line of its own."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        position = size
        while position > 0:
            position = max(0, position - 65536)
            file.seek(position)
            found = file.read(min(65536, size - position)).rfind(b"\n")
            if found >= 0:
                position += found + 1
                break
        if position < size:
            file.truncate(position)


class Recorded:
    """Replays a recording: same place and content first, else the same content.

    Replies join their rows at the recorded engine steps, so a replayed run is the recorded one to
    the bit, however long its expert took then; no socket is opened. A request that was never
    recorded raises `ReplayMismatch` out of the scheduler, because a run that asks something new is
    no replay; with `strict=False` it is answered `refused`, and replies join when they can.
    """

    immediate = True
    replays = True
    priced = True
    max_batch_size = 64

    def __init__(self, path: str | PathLike[str], *, strict: bool = True) -> None:
        self.path = Path(path)
        self.strict = strict
        self._by_place: dict[tuple[Place, Content], ExpertReply] = {}
        self._by_content: dict[Content, ExpertReply] = {}
        self._ticks: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for line in read_lines(self.path):
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if line["kind"] == "begin":
            self._ticks[line["step"], line["part"]] = []
        elif line["kind"] == "tick":
            place = line["step"], line["part"]
            if place not in self._ticks:
                raise DataError(f"{self.path}: step {place[0]} goes on without its beginning.")
            self._ticks[place].append(line)
        else:
            content = (line["query"], line["problem"], line["sample_index"])
            reply = _reply(line)
            self._by_place[tuple(line["place"]), content] = reply
            self._by_content.setdefault(content, reply)

    def __len__(self) -> int:
        return len(self._by_place)

    @property
    def identity(self) -> str:
        """Part of cache keys."""
        return f"recorded:{self.path}"

    def timeline(self, step: int, part: int) -> Tape:
        """When the replies of a collection joined; free running if none was ever recorded."""
        if not self.strict or not self._ticks:
            return Tape()
        return ReplayingTape(self._ticks.get((step, part), ()), str(self.path))

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """The recorded reply of each request."""
        return [self._find(request) for request in requests]

    def _find(self, request: ConsultRequest) -> ExpertReply:
        content = (request.query, request.problem, request.sample_index)
        reply = self._by_place.get((request.place, content)) or self._by_content.get(content)
        if reply is not None:
            return reply
        problem = f"{self.path} holds no consult {request.query!r} at {request.place}"
        if self.strict:
            raise ReplayMismatch(
                f"{problem}; replay with the seed, data and settings of the recording, "
                "or use Recorded(path, strict=False)."
            )
        return ExpertReply.failed("refused", problem)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a recording; DataError if it cannot be read or a line is damaged.

    The unfinished last line of a killed run is dropped.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(
            f"expert replay {str(path)!r} cannot be read ({error.strerror}); "
            "name a file written by expert_record."
        ) from None
    torn = lines.pop()
    parsed = [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    parsed += _parse_torn(torn, path) if torn else []
    _check_numbers(parsed, path)
    return parsed


def _check_numbers(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """DataError unless each line that has a number stands in its place."""
    for place, line in enumerate(lines, 1):
        if line.get("n", place) != place:
            raise DataError(
                f"{path}: line {line['n']} stands in the place of line {place}: lines were taken "
                "out, put in, or moved. Restore the file, or cut it before this line and replay up "
                "to there."
            )


def _parse_torn(line: str, path: Path) -> list[dict[str, Any]]:
    try:
        return [_parse(line, path, 0)]
    except DataError:
        return []


_TYPES: dict[str, dict[str, type]] = {
    "consult": {"query": str, "problem": str, "sample_index": int, "place": list, "text": str},
    "begin": {"step": int, "part": int},
    "tick": {"step": int, "part": int, "tick": int},
}


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = unsealed(line)
        types = _TYPES[record["kind"]]
        valid = all(isinstance(record[name], kind) for name, kind in types.items())
        valid = valid and (record["kind"] != "consult" or record["status"] in STATUSES)
        reason = "it is not written by expert_record"
    except DataError as error:
        valid, reason = False, str(error)
    except (KeyError, TypeError):
        valid, reason = False, "it is not written by expert_record"
    if not valid:
        raise DataError(
            f"{path}, line {number}: {reason}. Restore the file, or cut it before this line and "
            "replay up to there."
        )
    return record


def _reply(line: dict[str, Any]) -> ExpertReply:
    return ExpertReply(
        line["text"],
        usage_from_json(line.get("usage")),
        text_or_none(line.get("model")),
        status=line["status"],
        truncated=line.get("truncated") is True,
        unfit=line.get("unfit") is True,
        expert=text_or_none(line.get("expert")),
    )
