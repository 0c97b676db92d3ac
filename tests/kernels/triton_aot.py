"""Compiles what Triton launches would compile on a GPU, without one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the host code made it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and stack bytes a thread, shared memory a program."""

    registers: int
    stack: int
    shared: int
    ptx: str


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, args, constants))

        return launch


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Within the block, kernels that the modules launch are noted and not run."""
    launches: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for module, name, value in kernels:
        setattr(module, name, _Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)


def interpreted() -> bool:
    """Return whether kernels of this process are interpreted."""
    return bool(triton.knobs.runtime.interpret)


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile a launch for a compute capability (80, 90) with the specialisations of a real one."""
    signature, constants, attributes = _specialised(launch)
    options = {name: v for name, v in launch.constants.items() if name in OPTIONS}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(binary.asm["cubin"])
    return Resources(registers, stack, binary.metadata.shared, binary.asm["ptx"])


def variant(launch: Launch) -> str:
    """What a launch is compiled for: equal texts share a binary."""
    options = sorted((name, v) for name, v in launch.constants.items() if name in OPTIONS)
    return repr((launch.name, options, *_specialised(launch)))


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types of the arguments, values of the constants, and known divisibility."""
    params = launch.kernel.params
    positional = [p for p in params if not p.is_constexpr]
    assert len(positional) == len(launch.args)
    signature = {p.name: "constexpr" for p in params}
    attributes: dict[Any, Any] = {}
    constants = {name: v for name, v in launch.constants.items() if name not in OPTIONS}
    for p, value in zip(positional, launch.args, strict=True):
        signature[p.name] = _type(value)
        if p.do_not_specialize:
            continue
        if isinstance(value, int) and value == 1:
            signature[p.name] = "constexpr"
            constants[p.name] = 1
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(p.num,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(tools) if tools.exists() else shutil.which("cuobjdump")
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])
