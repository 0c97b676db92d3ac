"""Reward functions for the tests of `in_process`, in a module as they must be."""

from __future__ import annotations

import os
import time
from typing import Any


def process_id(*, completions: list[str], **columns: Any) -> list[float]:
    print("printing does no harm")
    return [float(os.getpid())] * len(completions)


async def lengths(*, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [len(text) + len(gold) / 10 for text, gold in zip(completions, answer, strict=True)]


def nap(*, completions: list[str], **columns: Any) -> list[float | None]:
    time.sleep(float(completions[0]))
    return [None] * len(completions)


def broken(*, completions: list[str], **columns: Any) -> list[float]:
    return [1 / int(text) for text in completions]


def deadly(*, completions: list[str], **columns: Any) -> list[float]:
    os._exit(3)
