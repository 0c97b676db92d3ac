"""Stages that go wrong, to be run as processes."""

from __future__ import annotations

import os
import time
from typing import Any


def run(request: Any, recorder: Any) -> None:
    """Do what the stage's name says, after a finding that must not be lost."""
    recorder.check("before", True)
    if request.stage == "hang":
        time.sleep(300)
    if request.stage == "crash":
        os.abort()
    if request.stage == "raise":
        raise ValueError("nobody caught it")
    if request.stage == "wrong":
        recorder.check("two and two", False, got=5)
    recorder.figure("after", 1.0, "s")
