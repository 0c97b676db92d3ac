"""Tier 4: what computer algebra decides, and the workers that it runs in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.rewards import verify
from eapo_fast.rewards.symbolic import Pool, WorkerFailure
from eapo_fast.rewards.symbolic.pool import _Worker

CORRECT = [
    (r"\int_0^1 x dx", r"\frac12"),
    (r"\int_0^\pi \sin x\,dx", "2"),
    (r"\int_1^2 \frac{dx}{x}", r"\ln 2"),
    (r"\int_0^1 (x^2 + 1) dx + 1", "7/3"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    (r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\frac{\pi^2}{6}"),
    (r"\sum_{k=1}^{10} k^2", "385"),
    (r"\sum_{k=0}^{\infty} \frac{1}{2^k}", "2"),
    (r"\sum_{k=1}^{\infty} 3 \left(-\frac23\right)^{k-1}", r"\frac95"),
    (r"\sum_{k=0}^{n-1} F_{n-k-1} F_k", r"\sum_{k=0}^{n-1} F_k F_{n-k-1}"),
    (r"\prod_{k=1}^{5} k", "120"),
    (r"\lim_{x\to 0}\frac{\sin x}{x}", "1"),
    (r"\lim_{n \to \infty} (1+1/n)^n", "e"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", r"\begin{pmatrix}7&10\\15&22\end{pmatrix}"),
    (r"\begin{pmatrix}2&0\\0&4\end{pmatrix}^{-1}", r"\begin{pmatrix}0.5&0\\0&0.25\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
    (r"2\begin{pmatrix}1\\2\end{pmatrix}", "(2,4)"),
    ("-x > -1", "x < 1"),
    (r"1\le |z|\le \frac32", r"z\in[-1.5,-1]\cup[1,1.5]"),
    ("x^2 < 4", "(-2,2)"),
    ("xy = 1", r"y = \frac1x"),
    ("x^2 - 4 = 0", "(x-2)^2(x+2) = 0"),
]
INCORRECT = [
    (r"\int_0^1 x dx", r"\frac13"),
    (r"\sum_{k=1}^{10} k^2", "386"),
    (r"\sum_{k=1}^{\infty} \frac{1}{2^k}", "2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", r"\begin{pmatrix}1&4\\9&16\end{pmatrix}"),
    ("x^2 < 4", "(-2,3)"),
    ("x^2 - 4 = 0", "(x-2)(x+3) = 0"),
    (r"(1, \int_0^1 x dx)", "(1, 1)"),
]
UNDECIDED = [
    (r"\int x dx", r"\frac{x^2}{2}", "antiderivative"),
    (r"\int_0^1 9^{9^9} x dx", "5", "too large"),
    (r"\int_0^1 \sin(\sin(\sin(e^{x^3}))) dx", "0.5", "limit"),
    (r"\sum_{k=1}^{10^{10}} \sin(k^2)", "5", "limit"),
    ("x^2+y^2=1", "x^2+y^2=2", "not compared"),
]


@pytest.mark.parametrize(("prediction", "gold"), CORRECT)
def test_computer_algebra_proves_equality(prediction: str, gold: str) -> None:
    assert verify(prediction, gold, extract="none").status == "correct"
    assert verify(gold, prediction, extract="none").status == "correct"


@pytest.mark.parametrize(("prediction", "gold"), INCORRECT)
def test_computer_algebra_finds_differences(prediction: str, gold: str) -> None:
    verdict = verify(prediction, gold, extract="none")
    assert verdict.status == "incorrect", verdict


@pytest.mark.parametrize(("prediction", "gold", "reason"), UNDECIDED)
def test_what_computer_algebra_leaves_open(prediction: str, gold: str, reason: str) -> None:
    verdict = verify(prediction, gold, extract="none")
    assert verdict.status == "undecided", verdict
    assert reason in verdict.reason


# Workers

EASY = {"prediction": r"\lim_{x\to 2} x", "reference": "2"}


class FaultyPool(Pool):
    """A pool whose workers stop (`hang`) or die (`die`) when the request says so."""

    def _ask(self, worker: _Worker, payload: bytes) -> dict[str, Any]:
        if b'"hang"' in payload:
            os.kill(worker.pid, signal.SIGSTOP)
        if b'"die"' in payload:
            os.kill(worker.pid, signal.SIGKILL)
        return super()._ask(worker, payload)


def descendants(pid: int) -> list[int]:
    """Return the processes below one that are not yet dead."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def memory(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))


def template_of(pool: Pool) -> int:
    assert pool._template is not None
    return pool._template.process.pid


@pytest.mark.slow
def test_a_thousand_requests_of_which_a_hundred_hang() -> None:
    before = set(descendants(os.getpid()))
    with FaultyPool(workers=4, work_seconds=0.25) as pool:
        pool.run(EASY)
        memory_before = memory(template_of(pool))

        def ask(number: int) -> str:
            request = EASY | ({"hang": 1} if number % 10 == 3 else {})
            try:
                return str(pool.run(request)["equal"])
            except WorkerFailure as reason:
                return str(reason)

        with ThreadPoolExecutor(16) as threads:
            replies = list(threads.map(ask, range(1000)))
        hung = [reply for number, reply in enumerate(replies) if number % 10 == 3]
        others = [reply for number, reply in enumerate(replies) if number % 10 != 3]
        assert set(hung) == {"symbolic work exceeds its time limit"}
        assert others == ["True"] * 900
        time.sleep(0.2)
        running = set(descendants(os.getpid())) - before
        assert len(running) <= 3, "the template and the workers that wait"
        assert memory(template_of(pool)) < memory_before + 8192
    time.sleep(0.05)
    assert set(descendants(os.getpid())) <= before


def test_the_death_of_a_worker_costs_one_request() -> None:
    with FaultyPool(workers=2) as pool:
        with pytest.raises(WorkerFailure, match="died"):
            pool.run(EASY | {"die": 1})
        assert pool.run(EASY)["equal"] is True
        os.kill(template_of(pool), signal.SIGKILL)
        pool._template.process.wait()  # type: ignore[union-attr]
        assert pool.run(EASY)["equal"] is True


def test_waiting_for_a_turn_is_not_work() -> None:
    with FaultyPool(workers=1, work_seconds=0.4) as pool:
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda: replies.append(pool.run(EASY)["equal"]))
            for _ in range(8)
        ]
        with ThreadPoolExecutor(2) as hanging:
            failures = [hanging.submit(pool.run, EASY | {"hang": 1}) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(isinstance(f.exception(), WorkerFailure) for f in failures)
        assert replies == [True] * 8


def test_a_worker_can_neither_open_nor_write_nor_compile() -> None:
    code = (
        "from eapo_fast.rewards.symbolic import work\n"
        "work.warm_up(); work.lock_down()\n"
        "import socket\n"
        "def refused(f):\n"
        "    try: f()\n"
        "    except OSError: return True\n"
        "    return False\n"
        "import os\n"
        "tests = [lambda: open('/etc/passwd'), lambda: socket.socket(),\n"
        "         lambda: os.system('true'), lambda: eval('1'), lambda: os.fork(),\n"
        "         lambda: os.posix_spawn('/bin/true', ['true'], {})]\n"
        "os._exit(0 if all(map(refused, tests)) else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_script_without_main_guard_that_forks_and_uses_threads(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, threading\n"
        "print('imported', flush=True)\n"
        "from eapo_fast.rewards import verify\n"
        "def check():\n"
        "    return verify('\\\\int_0^1 x dx', '1/2', extract='none').status == 'correct'\n"
        "ok = [check()]\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    from eapo_fast.rewards import verdict\n"
        "    verdict._compare_symbolically.cache_clear()\n"
        "    os._exit(0 if check() else 1)\n"
        "ok.append(os.waitpid(pid, 0)[1] == 0)\n"
        "thread = threading.Thread(target=lambda: ok.append(verify('\\\\int_0^2 x dx', '2',\n"
        "                          extract='none').correct))\n"
        "thread.start(); thread.join()\n"
        "print(ok)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout == "imported\n[True, True, True]\n"
    assert done.stderr == ""


def test_workers_end_with_their_owner() -> None:
    code = (
        "import os, signal; from eapo_fast.rewards import verify; "
        "from eapo_fast.rewards.symbolic import shared_pool; "
        "verify('\\\\int_0^1 x dx', '1/2', extract='none'); "
        "print(shared_pool()._template.process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    template = int(done.stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{template}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{template}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.02)
    assert time.monotonic() < deadline
