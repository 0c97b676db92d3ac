"""A folder that belongs to one piece of work, recognised by what decides its result."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.evaluation.settings import differences

IDENTITY = "identity.json"


def claim(
    folder: Path, identity: Mapping[str, Any], own: Sequence[str], what: str, *, restart: bool
) -> TextIO:
    """Make or reopen a folder and hold its lock.

    Args:
        folder: made if it is not there.
        identity: JSON-able settings and digests; kept in `identity.json`.
        own: names of the other files and folders of this work.
        what: its name in messages, "evaluation".
        restart: set what is there aside (as `<folder>/old`) instead of continuing it.

    Returns:
        The open lock; closing it, or the end of the process, gives the folder free.

    Raises:
        ConfigError: the folder holds something else, is in use or cannot be written.
    """
    lock = _locked(folder, what)
    try:
        if restart:
            _set_aside(folder, own)
        _check(folder, identity, own, what)
    except BaseException:
        lock.close()
        raise
    return lock


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; DataError if the file holds none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); the file was changed") from error
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    _replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Put a file in place when its bytes are on disk; lone surrogates stay escaped."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("wb") as file:
        file.write(text.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _check(folder: Path, identity: Mapping[str, Any], own: Sequence[str], what: str) -> None:
    path = folder / IDENTITY
    if not path.is_file():
        found = [name for name in own if (folder / name).exists()]
        if found:
            raise ConfigError(
                f"out: {folder} holds {found[0]} of something else; choose another folder (--out)"
            )
        write_json(path, identity)
        return
    changed = differences(read_json(path), json.loads(json.dumps(identity)))
    if changed:
        raise ConfigError(
            f"out: {folder} holds another {what}: {'; '.join(changed)}. Repeat the command with "
            f"the old settings to continue it, choose another folder (--out), or begin anew "
            f"(--restart)"
        )


def _set_aside(folder: Path, own: Sequence[str]) -> None:
    old = folder / "old"
    shutil.rmtree(old, ignore_errors=True)
    for name in (IDENTITY, *own):
        if (folder / name).exists():
            old.mkdir(exist_ok=True)
            (folder / name).rename(old / name)


def _locked(folder: Path, what: str) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"out: {folder} is in use by another {what}") from error
    return file
