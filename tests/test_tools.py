"""`.ci/tools` names what is missing before `make` does anything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("python3", "c++", "cmake", "make")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("c++", "cmake", "make")),
    reason="needs c++, cmake and make to hide them one by one",
)


@pytest.fixture
def path_without(tmp_path):
    """Make a PATH folder with a shell and the tools, some left out, some replaced by a script."""

    def build(hidden: str = "", **scripts: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in ("sh", *TOOLS):
            target = sys.executable if tool == "python3" else shutil.which(tool)
            if tool != hidden and tool.replace("+", "x") not in scripts:
                (folder / tool).symlink_to(str(target))
        for tool, body in scripts.items():
            script = folder / tool.replace("x", "+")
            script.write_text(f"#!/bin/sh\n{body}\n")
            script.chmod(0o755)
        return folder

    return build


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in {"CXX", "PYTHON", "MAKEFLAGS"}}
    return subprocess.run(
        command or (str(folder / "sh"), str(ROOT / ".ci" / "tools")),
        env=clean | {"PATH": str(folder)} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("python3", "missing: Python 3.11 or newer ('python3' is not on the PATH)"),
        ("c++", "missing: a C++20 compiler (c++, g++, clang++: not on the PATH)"),
        ("cmake", "missing: cmake 3.25 or newer (not on the PATH)"),
        ("make", "missing: make (not on the PATH)"),
    ],
)
def test_a_hidden_tool_is_named_with_a_remedy(path_without, tool, message):
    done = run(path_without(hidden=tool))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == message
    assert lines[1].startswith("  remedy: ")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("scripts", "message"),
    [
        pytest.param({"cmake": "echo cmake version 3.22.1"}, "(this is 3.22.1)", id="old-cmake"),
        pytest.param({"cxx": "exit 1"}, "('c++' does not compile C++20)", id="old-compiler"),
        pytest.param(
            {"python3": 'case $1 in --version) echo Python 3.9.2;; *) exit 1;; esac'},
            "('python3' is Python 3.9.2)",
            id="old-python",
        ),
    ],
)  # fmt: skip
def test_an_old_tool_is_named_with_its_version(path_without, scripts, message):
    done = run(path_without(**scripts))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("missing:") == 1


def test_named_tools_are_taken(path_without):
    folder = path_without(hidden="c++")
    assert run(folder, CXX=str(shutil.which("c++")), PYTHON=sys.executable).stderr == ""


def test_make_stops_before_it_touches_anything(path_without, tmp_path):
    venv = tmp_path / "venv"
    folder = path_without(hidden="cmake")
    pins = tmp_path / "pins.txt"
    pins.touch()
    done = run(folder, str(folder / "make"), "setup", f"VENV={venv}", f"CONSTRAINTS={pins}")
    assert done.returncode != 0
    assert "missing: cmake" in done.stderr
    assert not venv.exists()
