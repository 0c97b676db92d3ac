"""Replies since the last checkpoint, so that a run which dies does not buy them again.

A step that is done again samples the same rollouts, and they ask the same questions at the same
places; what was answered there before the crash is the answer still. Only equal questions at equal
places to the same expert are answered so: nothing is shared that was not shared before.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from eapo_fast.errors import DataError
from eapo_fast.experts.base import ConsultRequest, ExpertReply
from eapo_fast.experts.cache import reply_from_json, reply_to_json
from eapo_fast.experts.lines import read_sealed, sealed
from eapo_fast.experts.recording import end_torn_line

Name = tuple[str, tuple[int, ...]]


class KeptReplies:
    """A file of sealed lines, emptied at each checkpoint; thread-safe.

    Args:
        path: the file; made at the first reply.
        after: go on with the replies of later steps; None: a fresh run, which forgets them all.
    """

    def __init__(self, path: str | PathLike[str], after: int | None) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file: Any = None
        self._replies: dict[Name, ExpertReply] = {}
        if after is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            end_torn_line(self.path)
            self._read(after)

    def __len__(self) -> int:
        return len(self._replies)

    def _read(self, after: int) -> None:
        try:
            lines = read_sealed(self.path)
        except DataError:  # it saves money, no more: a damaged one saves none
            self.path.unlink()
            return
        for line in lines:
            reply = reply_from_json(line)
            if reply is not None and line["place"][0] > after:
                self._replies[line["key"], tuple(line["place"])] = reply

    def get(self, key: str, request: ConsultRequest) -> ExpertReply | None:
        """What was answered at this place before the crash, as a `cached` reply."""
        found = self._replies.get((key, request.place))
        return None if found is None else replace(found, status="cached", usage=None)

    def put(self, key: str, request: ConsultRequest, reply: ExpertReply) -> None:
        """Keep an accepted reply; OSError or ValueError if it cannot be written."""
        if (key, request.place) in self._replies:
            return  # it is one of them
        line = sealed({"key": key, "place": [*request.place], **reply_to_json(reply)}) + "\n"
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()

    def forget(self) -> None:
        """A checkpoint was written: no step before it is done again."""
        with self._lock:
            self._replies.clear()
            if self._file is None:
                self.path.unlink(missing_ok=True)
            else:
                self._file.truncate(0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
