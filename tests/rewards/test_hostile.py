from __future__ import annotations

import ast
import inspect
import json
import os
import random
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import eapo_fast.rewards as rewards
from eapo_fast.rewards import verify

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import completions

PACKAGE = Path(rewards.__file__).parent

CASES = completions()
FRESH = [
    "blow-up: tower of nines",
    "blow-up: factorial ratio",
    "blow-up: different roots",
    "blow-up: binomial",
    "chain: inverse of letters",
    "symbolic: hard integral",
    "symbolic: long product",
    "symbolic: set of a hard inequality",
    "size: deep roots",
    "size: megabyte of nines",
    "size: megabyte of joined boxes",
    "unicode: expanding ligatures",
    "lookalike: ramanujan",
]


def stretch() -> float:
    """Return how many seconds pass now for one second of work: above 1 when others use the cores.

    Times are promised for a machine with a free core.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.05:
        pass
    return (time.perf_counter() - wall) / (time.process_time() - cpu)


def seconds(prediction: str, gold: str) -> float:
    """Return the time of a verdict that is not `correct`; a slow one is timed again."""
    times: list[float] = []
    while not times or (min(times) >= 1.0 and len(times) < 4):
        load = stretch() if times else 1.0
        start = time.perf_counter()
        status = verify(prediction, gold).status
        times.append((time.perf_counter() - start) / load)
        assert status in ("incorrect", "undecided")
    return min(times)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize(("prediction", "gold"), CASES.values(), ids=CASES.keys())
def test_a_hostile_answer_is_never_correct_and_takes_little_time(
    prediction: str, gold: str
) -> None:
    assert seconds(prediction, gold) < 1.0
    assert seconds(gold, prediction) < 1.0


@pytest.mark.parametrize("name", FRESH)
def test_the_first_call_of_a_process_is_quick_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(json.dumps(CASES[name]))
    code = (
        "import json, time; from eapo_fast.rewards import verify\n"
        "a, b = json.load(open('case.json')); t = time.perf_counter(); v = verify(a, b)\n"
        "print(time.perf_counter() - t, v.status)\n"
    )
    times: list[float] = []
    while not times or (min(times) >= 1.0 and len(times) < 4):
        load = stretch() if times else 1.0
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        spent, status = done.stdout.split()
        times.append(float(spent) / load)
        assert status in ("incorrect", "undecided")
    assert min(times) < 1.0


def test_no_case_runs_anything(tmp_path: Path) -> None:
    code = (
        "import sys; from eapo_fast.rewards import verify\n"
        "from hostile_cases import completions\n"
        "verify(r'\\int_0^1 x dx', '1/2'); verify('2^{1/3}', '1.2'); verify('x+1', 'x')\n"
        "seen = []\n"
        "def watch(event, arguments):\n"
        "    if event in ('compile', 'exec', 'import', 'open', 'pickle.find_class') or (\n"
        "        event.startswith(('os.', 'subprocess.', 'ctypes.', 'shutil.'))\n"
        "    ):\n"
        "        seen.append((event, arguments))\n"
        "sys.addaudithook(watch)\n"
        "for prediction, gold in completions().values():\n"
        "    verify(prediction, gold)\n"
        "print(seen)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        check=True,
    )
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_a_caller_without_stack_gets_undecided() -> None:
    answer = r"\frac{1}{1+\sqrt{2+\frac{\sqrt{3}}{1+\frac{2}{\sqrt{5+\sqrt{7}}}}}}"

    def below(levels: int) -> str:
        if levels:
            return below(levels - 1)
        return verify(answer, r"\sqrt{2}", extract="none").status

    used = len(inspect.stack())
    assert below(sys.getrecursionlimit() - used - 100) == "undecided"
    assert below(10) == "incorrect"


def test_random_bytes_never_raise() -> None:
    draw = random.Random(7)
    pieces = [*string.printable, "\\frac", "\\sqrt", "\\boxed{", "\\text{", "\\left(", "^{", "}"]
    for _ in range(1500):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 40)))
        assert verify(text, "5", extract="none").status in ("correct", "incorrect", "undecided")
        verify("5", text)


def test_the_package_evaluates_no_text() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "literal_eval"}
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "id", getattr(function, "attr", ""))
                owner = getattr(getattr(function, "value", None), "id", "")
                assert name not in forbidden or (name, owner) == ("compile", "re"), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "sympy" not in ast.dump(node) or path.name in (
                    "build.py",
                    "decide.py",
                    "work.py",
                )
                assert "pickle" not in ast.dump(node)


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import sys, eapo_fast.rewards; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'sympy', 'flint', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verdicts_do_not_depend_on_threads() -> None:
    pairs = [(r"\sqrt{12}", r"2\sqrt{3}"), (r"\sin 1", r"\cos 1"), ("(x+1)^2", "x^2+2x+1")] * 5
    expected = [verify(a, b).status for a, b in pairs]
    results: dict[int, list[str]] = {}

    def work(worker: int) -> None:
        results[worker] = [verify(a, b).status for a, b in pairs]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected for result in results.values())
