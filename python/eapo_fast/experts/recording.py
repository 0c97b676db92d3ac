"""Record consults as JSON lines, and an expert that replays such a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
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
from eapo_fast.experts.cache import reply_to_json, usage_from_json

Place = tuple[int, ...]
Content = tuple[str, str, int]


class Recorder:
    """Appends one JSON line per consult; a line is on its way to disk before the result is out."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._lock = threading.Lock()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"expert record {str(path)!r} cannot be written ({error.strerror}); "
                "name a writable file or drop the setting."
            ) from None

    def write(self, request: ConsultRequest, reply: ExpertReply) -> None:
        """Append the line of one consult."""
        line = json.dumps(record_line(request, reply))
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def record_line(request: ConsultRequest, reply: ExpertReply) -> dict[str, Any]:
    """What a recording holds about one consult."""
    return {
        "query": request.query,
        "problem": request.problem,
        "sample_index": request.sample_index,
        "place": [*request.place],
        "status": reply.status,
        **reply_to_json(reply),
    }


class Recorded:
    """Replays a recording: same place and content first, else the same content.

    A request that was never recorded raises `ReplayMismatch` out of the scheduler, because a run
    that asks something new is no replay; with `strict=False` it is answered `refused`.
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
        for line in _read_lines(self.path):
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(
            f"expert replay {str(path)!r} cannot be read ({error.strerror}); "
            "name a file written by expert_record."
        ) from None
    torn = lines.pop()
    parsed = [_parse(line, path, number) for number, line in enumerate(lines, 1) if line]
    return parsed if not torn else parsed + _parse_torn(torn, path)


def _parse_torn(line: str, path: Path) -> list[dict[str, Any]]:
    """The unfinished last line of a killed run is dropped; a complete one is kept."""
    try:
        return [_parse(line, path, 0)]
    except DataError:
        return []


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        valid = (
            isinstance(record["query"], str)
            and isinstance(record["problem"], str)
            and isinstance(record["sample_index"], int)
            and isinstance(record["place"], list)
            and isinstance(record["text"], str)
            and record["status"] in STATUSES
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise DataError(f"{path}, line {number}: this is not a consult written by expert_record.")
    return dict(record)


def _reply(line: dict[str, Any]) -> ExpertReply:
    model = line.get("model")
    return ExpertReply(
        line["text"],
        usage_from_json(line.get("usage")),
        model if isinstance(model, str) else None,
        status=line["status"],
        truncated=line.get("truncated") is True,
    )
