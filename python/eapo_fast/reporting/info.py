"""What a bug report needs: versions, instruction set, devices, backends; works without torch."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton", "flash-attn", "peft")


def environment() -> list[tuple[str, str]]:
    """`(name, value)` pairs in the order they are printed; nothing in here raises."""
    import eapo_fast

    torch = _module("torch")
    core = _module("eapo_fast._core")
    return [
        ("eapo_fast", eapo_fast.__version__),
        ("installed in", os.path.dirname(eapo_fast.__file__)),  # noqa: PTH120
        ("python", f"{platform.python_version()} ({platform.platform()})"),
        *((name, _version(name)) for name in PACKAGES),
        ("native core", _core(core)),
        ("CPU", f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores usable"),
        ("CUDA devices", _devices(torch)),
        ("backends", ", ".join(_backends(torch, core))),
    ]


def info_lines() -> list[str]:
    """The pairs as aligned lines."""
    pairs = environment()
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {value}" for name, value in pairs]


def _module(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return "not installed"
    except (ImportError, OSError) as error:
        return f"broken: {' '.join(str(error).split())}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _core(core: ModuleType | str) -> str:
    if isinstance(core, str):
        return core
    try:
        return f"ISA {core.isa()} (this CPU has {', '.join(core.supported_isas())})"
    except ValueError as error:
        return str(error)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model n"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _devices(torch: Any) -> str:
    if isinstance(torch, str):
        return f"unknown (torch {torch})"
    if not torch.cuda.is_available():
        return f"none (torch built for {torch.version.cuda or 'CPU'})"
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _backends(torch: Any, core: ModuleType | str) -> list[str]:
    """Kernel backends that can run here."""
    cuda = not isinstance(torch, str) and torch.cuda.is_available()
    usable = {
        "reference": not isinstance(torch, str),
        "cpu": not isinstance(core, str),
        "triton": cuda and not isinstance(_module("triton"), str),
        "cuda": cuda and not isinstance(_module("eapo_fast._cuda"), str),
    }
    return [name for name, works in usable.items() if works] or ["none"]
