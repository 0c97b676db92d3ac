"""Fixtures of the expert tests: the loopback chat server and a check for left-over threads."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chat() -> ModuleType:
    """The module tests/experts/chat_server.py."""
    return sys.modules.get("chat_server") or _load("chat_server")


def eapo_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eapo-")]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Every scheduler of a test has ended its threads."""
    yield
    end = time.monotonic() + 2.0
    while eapo_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert eapo_threads() == []
