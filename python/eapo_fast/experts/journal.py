"""The ledger's journal: what was spent after the last checkpoint is not forgotten by a kill.

One sealed line for each change of the books, written before a call is sent and after it ended. It
is handed to the operating system at once, which outlives the process; a power cut may lose the
last moments.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.experts.lines import read_sealed, sealed
from eapo_fast.experts.recording import end_torn_line

logger = logging.getLogger("eapo_fast.experts")
Change = tuple[tuple[tuple[str, str], ...], tuple[int, int, int]]
"""Accounts as (scope, key), and what is added to each: consults, tokens, nano-units of money."""


class Journal:
    """Changes of the books, numbered from 1.

    Args:
        path: the file; an earlier one is kept as `<name>.old` unless it is `resumed`.
        resumed: go on in the file that is there.
    """

    def __init__(self, path: str | PathLike[str], *, resumed: bool) -> None:
        self.path = Path(path)
        self.number = 0
        self._lock = threading.Lock()
        self._told = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not resumed:
                self.path.replace(self.path.with_name(self.path.name + ".old"))
            end_torn_line(self.path)
            self._lines = read_sealed(self.path) if self.path.exists() else []
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the budget's journal {self.path} cannot be written ({error.strerror}); "
                "name a writable output_dir."
            ) from None
        if not all(isinstance(line.get("n"), int) for line in self._lines):
            raise DataError(f"{self.path} is not a budget's journal")
        self.number = max((int(line["n"]) for line in self._lines), default=0)

    def after(self, number: int) -> Iterator[Change]:
        """The changes that were there when the file was opened, after the one with this number."""
        lines, self._lines = self._lines, []
        for line in lines:
            if line["n"] > number:
                consults, tokens, nano = line["add"]
                accounts = tuple((str(per), str(key)) for per, key in line["accounts"])
                yield accounts, (int(consults), int(tokens), int(nano))

    def write(self, accounts: Sequence[tuple[str, str]], add: Sequence[int]) -> None:
        """Write a change; OSError if the disk refuses."""
        with self._lock:
            line = {"n": self.number + 1, "accounts": [*accounts], "add": [*add]}
            self._file.write(sealed(line) + "\n")
            self._file.flush()
            self.number += 1

    def refused(self, error: Exception) -> None:
        """Say once why nothing is spent any more."""
        if not self._told:
            self._told = True
            logger.warning("%s cannot be written, so consults end as budget: %s", self.path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r}, {self.number} changes)"


def note(journal: Journal | None, accounts: Sequence[Any], add: Sequence[int]) -> bool:
    """Write a change if there is a journal; False if it could not be written."""
    if journal is None:
        return True
    try:
        journal.write(accounts, add)
    except (OSError, ValueError) as error:
        journal.refused(error)
        return False
    return True
