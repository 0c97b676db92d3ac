"""The driver: picks stages, runs them in order, writes the report after each.

make gpu-check [COMMIT=hash] [ARGS="--out FOLDER --stages build,correctness"]
PYTHONPATH=benchmarks python -m gpu_check --device cpu --small --no-build   # without a GPU
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_check import report
from gpu_check.build import site_of
from gpu_check.environment import PACKAGES, commit_of
from gpu_check.records import Request
from gpu_check.runner import Outcome, Stage, end_all, run_side_by_side

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(__file__).resolve().parents[1]

_MODEL = ("torch", "transformers", "eapo_fast")
_TRAINER = (*_MODEL, "safetensors", "jinja2", "sympy", "flint", "rich", "matplotlib")
"""What the trainer imports on its way; rewards need the two for algebra."""
STAGES = (
    Stage("environment", "gpu_check.environment", 0, 40),
    Stage("build", "gpu_check.build", 1, 95, ("torch", "scikit_build_core", "pybind11")),
    *(
        Stage(
            f"triton_{dtype}",
            "gpu_check.correctness",
            2,
            80,
            ("triton", "eapo_fast"),
            "correctness",
            options={"backend": "triton", "dtype": dtype},
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    Stage(
        "cuda",
        "gpu_check.correctness",
        2,
        80,
        ("torch", "eapo_fast"),
        "correctness",
        options={"backend": "cuda"},
    ),
    Stage("tests", "gpu_check.suites", 2, 80, ("pytest", "eapo_fast"), "correctness"),
    Stage("sanitizer", "gpu_check.sanitizer", 2, 80, ("torch", "eapo_fast"), "correctness"),
    Stage("sampler", "gpu_check.sampler", 3, 65, _MODEL, elastic=True),
    Stage("training", "gpu_check.training", 3, 65, _TRAINER, elastic=True),
    Stage(
        "bench_loss", "gpu_check.bench_loss", 5, 65, ("torch", "eapo_fast"), "benchmarks",
        elastic=True,
    ),
    Stage("bench_sampler", "gpu_check.bench_sampler", 6, 85, _MODEL, "benchmarks", elastic=True),
    Stage("bench_step", "gpu_check.bench_step", 7, 65, _MODEL, "benchmarks", elastic=True),
    Stage(
        "bench_loss_cuda", "gpu_check.bench_loss", 8, 25, ("torch", "eapo_fast"), "benchmarks",
        options={"rows": "cuda"}, elastic=True,
    ),
    Stage(
        "bench_kernels", "gpu_check.bench_kernels", 9, 15, ("torch", "eapo_fast"), "benchmarks",
        elastic=True,
    ),
)  # fmt: skip
"""Their boxes (the longest of each number) add up to 8 minutes 55 seconds."""

LIMIT = 9 * 60.0
"""Seconds of a whole run; `--seconds` stretches or shrinks all boxes alike."""


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; returns 0 when none of them went wrong."""
    options = _options(arguments)
    run = _Run(options)
    picked = _picked(options.stages)
    for number in sorted({stage.number for stage in STAGES}):
        stages = [s for s in STAGES if s.number == number and (s.name in picked or number == 0)]
        if options.no_build:
            stages = [s for s in stages if s.name != "build"]
        if stages:
            run.stages(stages)
        if number == 0 and not run.device:
            print("no CUDA device: --device cpu --small runs the stages on reference devices")
            return 2
    print("\n" + report.table(run.report))
    print(f"\nwritten to {run.path}")
    if not options.keep:
        run.clean()
    return report.exit_code(run.report)


class _Run:
    """One run: its folder, its report, and what is known so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._start, self._options = time.time(), options
        self.device = "" if options.device == "auto" else options.device
        self._seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        self._work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self._wheels = _unpack(options.wheels, self._work)
        self._environment: dict[str, Any] = {}
        name = "gpu_check_cpu.json" if options.device == "cpu" else "gpu_check.json"
        self.path = Path(options.out).resolve() / name
        self.report: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "commit": commit_of(ROOT, options.commit),
            "seed": self._seed,
            "small": options.small,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": 0.0,
            "stages": [],
        }
        print(f"commit {self.report['commit']}, seed {self._seed}, scratch {self._work}")

    def stages(self, stages: list[Stage]) -> None:
        """Run stages of one number and write the report."""
        outcomes, due = [], []
        for stage in stages:
            missing = self._missing(stage)
            if missing:
                reason = f"needs {missing}"
                outcomes.append(Outcome(stage.name, "skipped", 0.0, [], reason))
            else:
                due.append((stage, self._request(stage)))
        at_once = 1 if self.device == "cpu" else len(due)
        scale = self._options.seconds / LIMIT
        until = self._start + scale * box_end(stages[0].number)
        variables = self._variables() | _threads(at_once)
        outcomes += run_side_by_side(due, variables, at_once=at_once, scale=scale, until=until)
        for outcome in outcomes:
            self.report["stages"].append(outcome.to_dict())
            print(f"{outcome.stage}: {outcome.status} in {outcome.seconds:.1f} s", flush=True)
        self._learn(outcomes)
        self.report["seconds"] = round(time.time() - self._start, 1)
        try:
            report.write(self.path, self.report)
        except OSError as error:
            print(f"{self.path} cannot be written: {error}", flush=True)

    def clean(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _request(self, stage: Stage) -> Request:
        return Request(
            stage=stage.name,
            device=self.device or "cpu",
            small=self._options.small,
            seed=self._seed,
            root=str(ROOT),
            work=str(self._work),
            results=str(self._work / f"{stage.name}.jsonl"),
            deadline=self._start + self._options.seconds,
            gpu=self._environment.get("gpu", ""),
            options=dict(stage.options),
        )

    def _missing(self, stage: Stage) -> str:
        """Return the modules that a stage needs and that are not here."""
        if time.time() - self._start > self._options.seconds - 5:
            return f"more time than the {self._options.seconds:.0f} s of the run"
        if not stage.needs:
            return ""
        modules = self._environment.get("modules", {})
        absent = [m for m in stage.needs if m != "eapo_fast" and not modules.get(m)]
        if absent:
            packages = ", ".join(PACKAGES.get(m, m) for m in absent)
            return f"{packages}; --wheels FOLDER brings wheels along"
        if "eapo_fast" in stage.needs and not self._importable():
            return "eapo_fast (it was not built)"
        return ""

    def _importable(self) -> bool:
        if site_of(self._work) is not None:
            return True
        code = "import eapo_fast, eapo_fast._core"
        environment = {**os.environ, **self._variables()}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=self._work, capture_output=True,
            check=False,
        )  # fmt: skip
        return done.returncode == 0

    def _variables(self) -> dict[str, str]:
        """Return the environment variables of the stages."""
        site = site_of(self._work)
        folders = [site, self._wheels, BENCHMARKS, os.environ.get("PYTHONPATH")]
        variables = {"PYTHONPATH": os.pathsep.join(str(f) for f in folders if f)}
        variables |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if self._wheels:
            variables["PATH"] = f"{self._wheels / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        if self.device == "cpu":
            variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return variables

    def _learn(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.stage == "environment":
                notes = [r for r in outcome.records if r["kind"] == "note"]
                found = {k: v for note in notes for k, v in note.items()}
                self._environment = {k: v for k, v in found.items() if k not in ("kind", "name")}
                self.report["environment"] = self._environment
                self.device = self.device or ("cuda" if self._environment.get("gpu") else "")


def _threads(stages: int) -> dict[str, str]:
    """Return the variables by which stages that run side by side share the cores."""
    if stages < 2 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // stages))}


def box_end(number: int) -> float:
    """Return when stages of a number end at the latest, in seconds since the run began."""
    boxes: dict[int, float] = {}
    for stage in STAGES:
        boxes[stage.number] = max(stage.seconds, boxes.get(stage.number, 0.0))
    return sum(seconds for n, seconds in boxes.items() if n <= number)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--small", action="store_true", help="sizes that take a CPU seconds")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results"), help="folder")
    parser.add_argument("--commit", help="commit of the tree, where there is no .git")
    parser.add_argument("--stages", default="", help="names or groups, separated by commas")
    parser.add_argument("--no-build", action="store_true", help="use the installed package")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")
    parser.add_argument("--wheels", help="folder of wheels of missing packages, to unpack")
    parser.add_argument("--seed", type=int, help="of all random inputs; else a fresh one")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole run")
    return parser.parse_args(arguments)


def _picked(text: str) -> set[str]:
    """Return the names that `--stages` picks; all for an empty text."""
    names = {stage.name for stage in STAGES}
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    known = names | {stage.group for stage in STAGES if stage.group}
    wrong = [part for part in wanted if part not in known]
    if wrong:
        raise SystemExit(f"--stages: got {', '.join(wrong)}; there are {', '.join(sorted(known))}")
    return {s.name for s in STAGES if s.name in wanted or s.group in wanted} if wanted else names


def _unpack(folder: str | None, work: Path) -> Path | None:
    """Install wheels that were brought along into a folder of this run."""
    if folder is None:
        return None
    wheels = sorted(map(str, Path(folder).glob("*.whl")))
    if not wheels:
        raise SystemExit(f"--wheels: there are none in {folder}")
    target = work / "wheels"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    done = subprocess.run([*command, "--target", str(target), *wheels], check=False)
    if done.returncode != 0:
        raise SystemExit(f"--wheels: pip ended with {done.returncode}")
    return target


def _ended(signum: int, _: object) -> None:
    """End the stages, which are in sessions of their own, together with the driver."""
    end_all()
    os._exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    signal.signal(signal.SIGINT, _ended)
    sys.exit(main())
