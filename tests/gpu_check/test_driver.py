"""The driver of the GPU check: time boxes, crashes, reports, commits, picks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fakes(environment: dict[str, str]) -> dict[str, str]:
    """The environment with `fake_stages` on the path."""
    folders = [str(Path(__file__).parent), environment["PYTHONPATH"]]
    return environment | {"PYTHONPATH": os.pathsep.join(folders)}


def test_a_stage_that_goes_wrong_stops_no_other(
    fakes: dict[str, str], make_request: Callable[..., Any]
) -> None:
    from gpu_check.runner import Stage, run_side_by_side

    names = ["fine", "hang", "crash", "raise", "wrong"]
    pairs = [(Stage(n, "fake_stages", 1, 3 if n == "hang" else 60), make_request(n)) for n in names]
    start = time.perf_counter()
    outcomes = run_side_by_side(pairs, fakes, at_once=5)
    assert time.perf_counter() - start < 30
    states = {o.stage: o.status for o in outcomes}
    assert states == {
        "fine": "passed",
        "hang": "timed out",
        "crash": "crashed",
        "raise": "crashed",
        "wrong": "failed",
    }
    for outcome in outcomes:
        assert outcome.records[0] == {"kind": "check", "name": "before", "passed": True}
    by_name = {o.stage: o for o in outcomes}
    assert "nobody caught it" in by_name["raise"].message
    assert [r["name"] for r in by_name["wrong"].records] == ["before", "two and two", "after"]


def test_boxes_stretch(fakes: dict[str, str], make_request: Callable[..., Any]) -> None:
    """With the scale of the run; an elastic stage has what others left, up to the run's end."""
    from gpu_check.runner import Stage, run_stage

    (box,) = (make_request("hang", seconds=60.0),)
    late = time.time() + 6.0
    cases = (
        (Stage("hang", "fake_stages", 1, 1), 3.0, late, 3.0),
        (Stage("hang", "fake_stages", 1, 1, elastic=True), 1.0, late, 6.0),
    )
    for stage, scale, until, seconds in cases:
        outcome = run_stage(stage, box, fakes, scale=scale, until=until)
        assert outcome.status == "timed out"
        assert seconds - 4 < outcome.seconds < seconds + 2
    done = run_stage(cases[1][0], make_request("hang", seconds=1.5), fakes, until=late + 60)
    assert done.seconds < 4


def test_a_stage_that_cannot_be_started_stops_no_other(
    fakes: dict[str, str], make_request: Callable[..., Any], tmp_path: Path
) -> None:
    from gpu_check.runner import Stage, run_side_by_side

    gone = make_request("fine", results=str(tmp_path / "no" / "folder.jsonl"))
    pairs = [
        (Stage("fine", "fake_stages", 1, 60), request) for request in (gone, make_request("fine"))
    ]
    outcomes = run_side_by_side(pairs, fakes, at_once=2)
    assert [o.status for o in outcomes] == ["crashed", "passed"]
    assert "FileNotFoundError" in outcomes[0].message


def test_the_end_of_a_time_box_ends_grandchildren(
    fakes: dict[str, str], make_request: Callable[..., Any], tmp_path: Path
) -> None:
    from gpu_check.runner import Stage, run_stage

    (tmp_path / "forks.py").write_text(
        "import subprocess, sys\n"
        "def run(request, recorder):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "    recorder.note('child', pid=child.pid)\n"
        "    child.wait()\n"
    )
    path = os.pathsep.join([str(tmp_path), fakes["PYTHONPATH"]])
    outcome = run_stage(Stage("forks", "forks", 1, 3), make_request("forks"), {"PYTHONPATH": path})
    assert outcome.status == "timed out"
    assert_ends(outcome.records[0]["pid"])


def assert_ends(pid: int) -> None:
    """Fail unless a process is gone soon."""
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        try:
            if state.read_text().split()[2] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} outlived what it belongs to")


def test_a_driver_that_is_ended_ends_its_stages(fakes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "drive.py").write_text(
        "import signal, sys\n"
        "import gpu_check.__main__ as driver\n"
        "signal.signal(signal.SIGTERM, driver._ended)\n"
        "stage = driver.Stage('hang', 'fake_stages', 1, 60)\n"
        "driver.STAGES = (driver.STAGES[0], stage)\n"
        "driver.main(['--device', 'cpu', '--no-build', '--out', sys.argv[1]])\n"
    )
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "drive.py"), str(tmp_path)],
        env={**os.environ, **fakes, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )
    for _ in range(600):
        if list(tmp_path.glob("gpu-check-*/hang.jsonl")):
            break
        time.sleep(0.1)
    tasks = Path(f"/proc/{driver.pid}/task")
    pids = [int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()]
    assert len(pids) == 1
    driver.terminate()
    assert driver.wait(20) == 128 + signal.SIGTERM
    assert_ends(pids[0])


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    from gpu_check.records import read_records

    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "check", "name": "a", "passed": true}\n{"kind": "che')
    assert [r["name"] for r in read_records(path)] == ["a"]
    assert read_records(tmp_path / "none.jsonl") == []


def test_bars(make_request: Callable[..., Any]) -> None:
    from gpu_check.records import Bar, Recorder, read_records

    assert Bar("<=", 155.0, "H200").met(150.0, "NVIDIA H200") is True
    assert Bar("<=", 155.0, "H200").met(156.0, "NVIDIA H200") is False
    assert Bar("<=", 155.0, "H200").met(150.0, "NVIDIA A100-SXM4-80GB") is None
    assert Bar(">=", 0.9).met(0.9, "any") is True
    assert Bar("<=", 0.1).met(float("nan"), "any") is False
    for device, met in (("cuda", False), ("cpu", None)):
        request = make_request(f"bars-{device}", device=device, gpu="NVIDIA H200")
        Recorder(request).figure("share", 0.5, "", Bar(">=", 0.9))
        (record,) = read_records(Path(request.results))
        assert record["passed"] is met
        assert record["bar"] == ">= 0.9"


def test_guards(make_request: Callable[..., Any]) -> None:
    from gpu_check.records import Recorder, RefusedError, read_records

    request = make_request("guards")
    recorder = Recorder(request)
    for name in ("op a float32", "op a bfloat16", "op b"):
        with recorder.guard(name):
            raise RefusedError("it has none")
    with recorder.guard("broken"):
        raise ValueError("no such shape")
    with recorder.guard("peer", optional=True):
        raise ImportError("no liger_kernel")
    kinds = [(r["kind"], r["name"]) for r in read_records(Path(request.results))]
    skipped = [("skip", "op a float32"), ("skip", "op b")]  # another dtype says nothing new
    assert kinds == [*skipped, ("check", "broken"), ("skip", "peer")]


def test_report(tmp_path: Path) -> None:
    from gpu_check import report

    records = [
        {"kind": "check", "name": "exact", "passed": True},
        {"kind": "check", "name": "not exact", "passed": False, "got": 3},
        {"kind": "figure", "name": "fast", "value": 140.0, "unit": "ms", "bar": "<= 155",
         "passed": True},
        {"kind": "figure", "name": "slow", "value": 0.5, "unit": "", "bar": ">= 0.9",
         "passed": False},
        {"kind": "skip", "name": "liger", "reason": "not installed"},
    ]  # fmt: skip
    stages = [
        {"stage": "a", "status": "failed", "seconds": 1.0, "records": records, "message": "x\ny"},
        {"stage": "b", "status": "skipped", "seconds": 0.0, "records": [], "message": "needs z"},
    ]
    found = {"commit": "abc", "seed": 1, "seconds": 2.0, "stages": stages, "environment": {}}
    report.write(tmp_path / "deep" / "run.json", found)
    assert json.loads((tmp_path / "deep" / "run.json").read_text()) == found
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run.json"]
    text = report.table(found)
    for part in ("FAILED  not exact", "<= 155         pass", ">= 0.9         MISS", "needs z"):
        assert part in text
    assert "1 of 2 checks hold, 1 of 2 bars are reached; not in order: a; skipped: b" in text
    last = text[text.index("Bars:") :].splitlines()
    assert [line.split()[0] for line in last[1:4]] == ["fast", "slow", "FAILED"]
    assert last[3] == "FAILED  not exact"
    assert report.exit_code(found) == 1
    missed = [{**stages[0], "status": "passed"}, stages[1]]
    assert report.exit_code({**found, "stages": missed}) == 0
    assert report.exit_code({**found, "stages": stages[1:]}) == 1  # nothing was done


def test_commits(tmp_path: Path) -> None:
    from gpu_check.environment import commit_of

    assert commit_of(tmp_path, None) == "unknown"
    (tmp_path / "COMMIT").write_text("0123abc\n")
    assert commit_of(tmp_path, None) == "0123abc"
    assert commit_of(tmp_path, "feed") == "feed"


def test_picks_and_boxes() -> None:
    from gpu_check.__main__ import LIMIT, STAGES, _picked, box_end
    from gpu_check.environment import PACKAGES

    assert _picked("") == {s.name for s in STAGES}
    benchmarks = {f"bench_{name}" for name in ("loss", "loss_cuda", "sampler", "step", "kernels")}
    assert _picked("cuda, benchmarks") == {"cuda", *benchmarks}
    with pytest.raises(SystemExit, match=r"got smapler; there are bench_kernels"):
        _picked("smapler")
    assert box_end(STAGES[-1].number) < LIMIT <= 540
    assert box_end(0) == STAGES[0].seconds
    checked = [s.options for s in STAGES if s.module == "gpu_check.correctness"]
    assert [o["backend"] for o in checked] == ["triton"] * 3 + ["cuda"]
    assert all(isinstance(s.elastic, bool) for s in STAGES)
    assert {need for s in STAGES for need in s.needs} - {"eapo_fast"} <= set(PACKAGES)


def test_a_run_without_a_gpu(
    tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver from end to end: a quick stage, one that has nothing to do, a report."""
    from gpu_check.__main__ import main

    arguments = ["--device", "cpu", "--small", "--no-build", "--seed", "5", "--commit", "feed"]
    arguments += ["--out", str(tmp_path), "--stages", "sanitizer,tests"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    assert (found["commit"], found["seed"], found["small"]) == ("feed", 5, True)
    states = {s["stage"]: s["status"] for s in found["stages"]}
    assert states == {"environment": "passed", "tests": "passed", "sanitizer": "skipped"}
    assert found["environment"]["modules"]["torch"] is True
    assert "there is no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch_says", "device"), [(None, "cuda"), ("NVIDIA H200", "cuda"), ("", "")]
)
def test_a_gpu_is_found_without_torch(
    torch_says: str | None, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first import of torch may outlast its box; a torch for CPUs has no use for a GPU."""
    import gpu_check.__main__ as driver
    from gpu_check.runner import Outcome

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = driver._Run(driver._options(["--out", str(tmp_path)]))
    records = [{"kind": "note", "name": "environment", "gpu": "NVIDIA H200", "modules": {}}]
    if torch_says is not None:
        records.append({"kind": "note", "name": "torch", "gpu": torch_says, "torch": "2.11.0"})
    run._learn([Outcome("environment", "timed out", 40.0, records)])
    assert run.device == device


def test_missing_packages_skip_what_needs_them(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_check.__main__ as driver

    stages = (driver.STAGES[0], driver.Stage("x", "fake_stages", 1, 5, ("no_such_package",)))
    monkeypatch.setattr(driver, "STAGES", stages)
    assert driver.main(["--device", "cpu", "--small", "--no-build", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_check_cpu.json").read_text())["stages"][1]
    assert found["status"] == "skipped"
    assert found["message"] == "needs no_such_package; --wheels FOLDER brings wheels along"


def test_build_of_a_project(
    tmp_path: Path, make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project without compiled parts stands for ours, whose build the packaging test covers."""
    pytest.importorskip("scikit_build_core")
    from gpu_check import build
    from gpu_check.records import Recorder, read_records

    monkeypatch.setattr(build, "_INTERPRETER", (sys.executable, "-S"))  # no editable install
    project = tmp_path / "project"
    (project / "src/eapo_fast").mkdir(parents=True)
    (project / "src/eapo_fast/__init__.py").write_text("")
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(x LANGUAGES NONE)\n"
    )
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["scikit-build-core"]\n'
        'build-backend = "scikit_build_core.build"\n'
        '[project]\nname = "eapo_fast"\nversion = "0.0.1"\n'
        '[tool.scikit-build.wheel.packages]\n"eapo_fast" = "src/eapo_fast"\n'
    )
    request = make_request("build", root=str(project))
    build.run(request, Recorder(request))
    records = read_records(Path(request.results))
    assert all(r["passed"] for r in records if r["kind"] == "check"), records
    assert build.site_of(Path(request.work)) == Path(request.work) / "site"

    (project / "CMakeLists.txt").write_text("message(FATAL_ERROR nothing)\n")
    broken = make_request("broken", root=str(project), work=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    build.run(broken, Recorder(broken))
    (record,) = read_records(Path(broken.results))
    assert not record["passed"]
    assert build.site_of(Path(broken.work)) is None


def test_architectures() -> None:
    from gpu_check.build import architecture

    assert architecture((8, 0)) == "80-real"
    assert architecture((9, 0)) == "90a-real"


def test_covered_time() -> None:
    from gpu_check.trace import covered

    assert covered([]) == (0, [0.0] * 5)
    spans = [(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]
    assert covered(spans) == (5.0, [2.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.skipif(sys.platform != "linux", reason="a shell script stands for the program")
@pytest.mark.parametrize(
    ("script", "kind", "passed"),
    [
        ("echo '========= Error: Device not supported'; exit 1", "skip", None),
        ('case "$*" in *child*) echo "========= ERROR SUMMARY: 3 errors"; exit 97;; esac',
         "check", False),
    ],
    ids=["refuses the device", "finds errors"],
)  # fmt: skip
def test_sanitizer(
    script: str,
    kind: str,
    passed: bool | None,
    tmp_path: Path,
    make_request: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpu_check import sanitizer
    from gpu_check.records import Recorder, read_records

    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: str(program))
    monkeypatch.setattr(sanitizer, "find_spec", lambda name: True)
    request = make_request("sanitizer", device="cuda")
    sanitizer.run(request, Recorder(request))
    records = read_records(Path(request.results))
    assert {r["kind"] for r in records} == {kind}
    if kind == "check":
        assert [r["passed"] for r in records] == [passed] * len(sanitizer.TOOLS)
        assert records[0]["summary"] == "ERROR SUMMARY: 3 errors"
