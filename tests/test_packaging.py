"""A real sdist, a real wheel built from it in isolation, installed where there is no torch."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_INDEX = (
    "Could not find a version",
    "No matching distribution",
    "Temporary failure",
    "timed out",
)

if not (ROOT / "CMakeLists.txt").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

pytestmark = pytest.mark.slow


def run(*command: str | Path, check: bool = True, **environment: str) -> str:
    """Run a command away from the checkout; returns stdout and stderr together."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=Path(sys.prefix).anchor,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if check and result.returncode != 0:
        if any(sign in result.stdout for sign in NO_INDEX):
            pytest.skip("no package index to fetch the build requirements from")
        pytest.fail(f"{command} failed:\n{result.stdout[-4000:]}")
    return result.stdout


@pytest.fixture(scope="module")
def version() -> str:
    """The one version, in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of the checkout."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core makes the sdist")
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import os; os.chdir({str(ROOT)!r}); from scikit_build_core.build import build_sdist; "
    run(sys.executable, "-c", code + f"build_sdist({str(folder)!r})")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(sdist: Path, fresh_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist by pip's isolated build."""
    folder = tmp_path_factory.mktemp("wheel")
    run(fresh_python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, fresh_python: Path) -> Path:
    """The interpreter of an environment that holds the wheel and nothing else."""
    run(fresh_python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    assert "No module named 'torch'" in run(fresh_python, "-c", "import torch", check=False)
    return fresh_python


def sources(folder: str) -> list[str]:
    """Files under `folder` that git does not ignore as caches, relative to it."""
    base = ROOT / folder
    found = (p.relative_to(base) for p in base.rglob("*") if p.is_file())
    return [p.as_posix() for p in found if "__pycache__" not in p.parts and p.suffix != ".so"]


def test_sdist_holds_the_sources_and_nothing_else(sdist: Path, version: str) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    top = f"eapo_fast-{version}/"
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/bindings/core_module.cpp"):
        assert top + name in names
    assert {top + "kernels/" + name for name in sources("kernels")} <= set(names)
    unwanted = ("/.venv", "/build/", "/runs/", "__pycache__", ".so")
    assert not [name for name in names if any(part in name for part in unwanted)]


def test_wheel_holds_the_merged_package_and_no_native_source(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    python = {"eapo_fast/" + name for name in sources("python/eapo_fast")}
    kernels = {
        "eapo_fast/kernels/" + name
        for name in sources("kernels")
        if not name.endswith((".cu", ".cuh", ".h"))
    }
    assert python | kernels <= names
    native = {name for name in names if name.endswith(".so")}
    assert names - native == python | kernels | {n for n in names if ".dist-info/" in n}
    assert f"eapo_fast/_core{sysconfig.get_config_var('EXT_SUFFIX')}" in native
    expected = 2 if shutil.which("nvcc") and os.environ.get("EAPO_FAST_CUDA") != "OFF" else 1
    assert len(native) == expected
    assert f"eapo_fast-{version}.dist-info/entry_points.txt" in names


def test_native_module_runs_without_torch(installed: Path, version: str) -> None:
    code = (
        "import eapo_fast._core as c; print(c.__version__, c.isa());"
        "print(c.keyed_uniform(1, 'x', [2]))"
    )
    first, draw = run(installed, "-c", code).split("\n")[:2]
    assert first == f"{version} {first.split()[1]}"
    assert 0 <= float(draw) < 1


def test_cuda_module_imports_without_a_driver(installed: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if not any("/_cuda" in name and name.endswith(".so") for name in archive.namelist()):
            pytest.skip("built without nvcc")
    assert "group_advantages" in run(installed, "-c", "import eapo_fast._cuda as c; print(dir(c))")


def test_import_takes_less_than_a_tenth_of_a_second(installed: Path) -> None:
    code = (
        "import time; start = time.perf_counter(); import eapo_fast;"
        "print(time.perf_counter() - start)"
    )
    assert statistics.median(float(run(installed, "-c", code)) for _ in range(5)) < 0.1


def test_command_line_help_needs_no_torch(installed: Path) -> None:
    dependencies = sysconfig.get_path("purelib")
    script = installed.with_name("eapo-fast")
    assert "usage" in run(script, "--help").lower()
    code = (
        f"import sys; sys.path.append({dependencies!r})\n"
        "import contextlib, eapo_fast; from eapo_fast.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print(eapo_fast.__file__, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    last = run(installed, "-c", code).strip().split("\n")[-1]
    assert last.startswith(str(installed.parents[1]))
    assert last.endswith("[]")


def configure(tmp_path: Path, choice: str) -> str:
    """What CMake says about EAPO_FAST_CUDA=`choice` on a machine without nvcc."""
    pybind11 = pytest.importorskip("pybind11", reason="CMake needs it")
    return run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-DEAPO_FAST_CUDA={choice}",
        "-DCMAKE_CUDA_COMPILER=NOTFOUND",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        check=False,
    )


@pytest.mark.parametrize(
    ("choice", "message", "succeeds"),
    [
        ("AUTO", "eapo_fast: no nvcc found, building without the CUDA kernels", True),
        ("ON", "EAPO_FAST_CUDA=ON, but no nvcc was found: put it on PATH", False),
        ("OFF", "Configuring done", True),
        ("maybe", "EAPO_FAST_CUDA is 'maybe', want AUTO, ON or OFF", False),
    ],
)
def test_build_without_nvcc(tmp_path: Path, choice: str, message: str, succeeds: bool) -> None:
    output = configure(tmp_path, choice)
    assert message in " ".join(output.split())
    assert ("Build files have been written" in output) == succeeds
    assert "building the CUDA kernels with" not in output
