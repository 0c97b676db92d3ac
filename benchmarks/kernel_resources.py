"""Registers, stack, spills and shared memory of the CUDA and Triton kernels; needs no GPU.

    python benchmarks/kernel_resources.py > benchmarks/results/kernel_resources.txt

CUDA: nvcc's report (-Xptxas -v) for sm_80 and sm_90a, and PTX for compute_90. Triton: the kernels
of the losses, compiled as their host code launches them on a head of Qwen2.5-0.5B's vocabulary,
with SIREN's search for a border and the kernel that cuts slabs; and the pieces of a layer of
Qwen2.5-0.5B's shape.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "kernels"


def cuda(source: Path, arch: str, folder: Path) -> list[str]:
    """Return one line a kernel."""
    compute = arch.replace("sm_", "compute_")
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", f"-gencode=arch={compute},code={arch}", f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'kernels'}", "-Xptxas=-v", "-c", str(source), "-o", str(folder / "k.o"),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if not arch.startswith("sm_"):
        return [f"{source.parent.name:18} {arch:10} compiles to PTX"]
    found = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers(.*)",
        done.stderr,
    )
    if not found:
        raise RuntimeError(f"nvcc reported nothing about {source}:\n{done.stderr}")
    names = demangled([entry[0] for entry in found])
    lines = []
    for name, (_, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(stores) + int(loads)
        lines.append(
            f"{source.parent.name:18} {arch:10} {registers:>4} registers {stack:>4} B stack "
            f"{spilled:>4} B spilled {shared[1] if shared else 0:>6} B shared  {name}"
        )
    return lines


def demangled(names: list[str]) -> list[str]:
    """Return readable names, without arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    lines = (x.replace("(anonymous namespace)::", "") for x in done.stdout.splitlines())
    return [re.sub(r"\(.*|eapo::cuda::|^void ", "", line)[:80] for line in lines]


def triton_lines() -> list[str]:
    """Return one line for each of the loss kernels' variants."""
    sys.path.insert(0, str(TESTS))
    import test_triton_compile_loss as losses
    import triton_aot

    lines = []
    for capability in (80, 90):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            launches = losses.launches_of(
                "eapo", dtype=dtype, vocab=151_936, entropy_coef=0.01, beta=0.1, delta=2.0
            )
            name = str(dtype).removeprefix("torch.")
            for launch in {triton_aot.variant(x): x for x in launches}.values():
                lines.append(triton_line(triton_aot, launch, capability, name))
        cut = losses.launches_of("siren", vocab=151_936, plan="prepass", max_length=100)
        slabs = losses.launches_of("gspo", vocab=151_936)
        chosen = [x for x in cut if x.name == "run_rows"]
        chosen += [x for x in slabs if x.name == "cut_slabs"]
        for launch in {triton_aot.variant(x): x for x in chosen}.values():
            rows = launch.name == "run_rows"
            note = "of a batch"
            if rows:
                note = "statistics of siren" if launch.constants["STATISTICS"] else "its gradient"
            lines.append(triton_line(triton_aot, launch, capability, note))
        note = "float32, its gradient bfloat16"
        lines.append(triton_line(triton_aot, losses.library_rows(), capability, note))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            note = f"given logits, {str(dtype).removeprefix('torch.')}"
            for launch in losses.given_launches(dtype):
                if launch.name.endswith("_rows"):
                    lines.append(triton_line(triton_aot, launch, capability, note))
    return lines


def layer_lines() -> list[str]:
    """Return one line for each variant of the pieces of a layer of Qwen2.5-0.5B's shape."""
    import test_triton_compile as sampler
    import triton_aot

    lines = []
    flags = ("ADD", "UNIT_OFFSET", "CAST", "GELU", "ROUND")
    for capability in (80, 90):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for launch in {triton_aot.variant(x): x for x in sampler.layer(dtype)}.values():
                on = [name.lower() for name in flags if launch.constants.get(name)]
                if launch.constants.get("REST"):
                    on.append("half of a head")
                if launch.constants.get("ADD") and launch.args[0].dtype != launch.args[1].dtype:
                    on.append("to float32 sums")
                note = ", ".join([str(dtype).removeprefix("torch."), *on])
                lines.append(triton_line(triton_aot, launch, capability, note))
    return lines


def triton_line(aot: Any, launch: Any, capability: int, note: str) -> str:
    """Compile a launch and return its line."""
    found = aot.compiled(launch, capability)
    return (
        f"{launch.name:18} sm_{capability:<7} {found.registers:>4} registers "
        f"{found.stack:>4} B stack {found.shared:>22} B shared  {note}"
    )


def main() -> None:
    """Print the report."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    print("CUDA,", re.search(r"release \S+", version.stdout)[0].rstrip(","))  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "kernels").glob("*/kernel.cu")):
            for arch in ("sm_80", "sm_90a", "compute_90"):
                print("\n".join(cuda(source, arch, Path(folder))), flush=True)
    import triton

    print(f"\nTriton {triton.__version__}")
    print("\n".join(triton_lines()))
    print("\n".join(layer_lines()))


if __name__ == "__main__":
    main()
