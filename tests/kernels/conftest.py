"""Makes the oracles importable from the tests beside them, and runs tests on every ISA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eapo_fast import _core

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu")]

from gpu_runs import Running  # noqa: E402


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """All checks that the tests of a module ask for, started at its first one."""
    items = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec.params for item in items if isinstance(item, pytest.Function)
             and hasattr(item, "callspec")]  # fmt: skip
    found = Running([params["checks"] for params in calls if "checks" in params])
    yield found
    found.close()


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every instruction set of this CPU."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)
