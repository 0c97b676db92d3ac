"""The CUDA sources compile for sm_80 and sm_90a, and keep their values in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels").glob("*/kernel.cu"))
KERNELS = {
    "group_advantages": 1,
    "kv_write": 8,
    "linear_token_stats": 4,
    "paged_attention": 33,
    "sample": 6,
}
"""Entry functions of each op, all instances counted."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-std=c++17",
        f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'kernels'}",
        "-Xptxas=-v",
        "-Werror=all-warnings",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "kernel.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(frames) == KERNELS[source.parent.name]
    assert set(frames) == {("0", "0")}


def test_every_source_is_counted() -> None:
    assert [path.parent.name for path in SOURCES] == sorted(KERNELS)
