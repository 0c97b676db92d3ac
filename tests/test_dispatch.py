"""Choice of the instruction set and of the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from eapo_fast import _core

KNOWN = ["scalar", "avx2", "avx512", "avx512bf16"]

FORKING = """
import os, torch
from eapo_fast import _core
from eapo_fast.kernels.sample import sample

def run(n=64):
    full = lambda x, dtype=torch.float32: torch.full((n,), x, dtype=dtype)
    sample(torch.randn(n, 5000), rows=torch.arange(n, dtype=torch.int32),
           uniforms=torch.rand(n), temperatures=full(1.0), top_ks=full(0, torch.int32),
           top_ps=full(1.0), min_ps=full(0.0))
    _core.set_num_threads(2)

run(); run()
openmp = "parallel backend: OpenMP" in torch.__config__.parallel_info()
assert _core.shares_openmp() == openmp, "on Linux"
pid = os.fork()
if pid == 0:
    run()
    os._exit(7 if _core.num_threads() == 2 and not _core.shares_openmp() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """Leave instruction set and threads as they were."""
    isa, threads = _core.isa(), _core.num_threads()
    yield
    _core.set_isa(isa)
    _core.set_num_threads(threads)


def isa_of_new_process(value: str | None) -> subprocess.CompletedProcess[str]:
    """Import the core with EAPO_FAST_ISA set to `value` and print the ISA it picks."""
    environment = {k: v for k, v in os.environ.items() if k != "EAPO_FAST_ISA"}
    if value is not None:
        environment["EAPO_FAST_ISA"] = value
    code = "from eapo_fast import _core; print(_core.isa())"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_supported_isas_are_known_and_start_with_scalar() -> None:
    supported = _core.supported_isas()
    assert supported[0] == "scalar"
    assert supported == [name for name in KNOWN if name in supported]


@pytest.mark.parametrize("value", [None, "", "auto"], ids=["unset", "empty", "auto"])
def test_widest_isa_is_the_default(value: str | None) -> None:
    assert isa_of_new_process(value).stdout.strip() == _core.supported_isas()[-1]


@pytest.mark.parametrize("name", _core.supported_isas())
def test_environment_forces_an_isa(name: str) -> None:
    assert isa_of_new_process(name).stdout.strip() == name


def test_bad_environment_says_what_is_allowed() -> None:
    result = isa_of_new_process("sse9")
    assert result.returncode != 0
    assert "ValueError: EAPO_FAST_ISA is 'sse9'" in result.stderr
    assert all(name in result.stderr for name in _core.supported_isas())


def test_set_isa_switches_and_rejects() -> None:
    for name in _core.supported_isas():
        _core.set_isa(name)
        assert _core.isa() == name
    with pytest.raises(ValueError, match="isa is 'mmx', but this build on this CPU runs: scalar"):
        _core.set_isa("mmx")


def test_threads() -> None:
    _core.set_num_threads(3)
    assert _core.num_threads() == 3
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=rf"must be in 1..1024, got {count}"):
            _core.set_num_threads(count)


@pytest.mark.parametrize("value", [[1.0], "text", None], ids=["list", "str", "none"])
def test_what_is_no_tensor_is_named_without_its_contents(value: object) -> None:
    with pytest.raises(TypeError, match=r"^cache: want a torch.Tensor, got \w+$"):
        _core.copy_blocks(value, torch.zeros(0, 2, dtype=torch.int32))  # type: ignore[arg-type]


def test_kernels_work_in_a_forked_child() -> None:
    """The thread pool of the parent does not exist in the child: it must start its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "7", result.stderr
