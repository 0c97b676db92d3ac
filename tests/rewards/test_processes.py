from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.rewards import in_process
from eapo_fast.rewards.processes import ProcessDied

sys.path.insert(0, str(Path(__file__).parent))
import slow_rewards


def call(function: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    async def run() -> list[float | None]:
        result: list[float | None] = await function(completions=completions, **columns)
        return result

    return asyncio.run(run())


def test_the_function_runs_elsewhere_under_its_own_name() -> None:
    function = in_process(slow_rewards.process_id)
    assert function.__name__ == "process_id"
    [first] = call(function, ["a"], rollouts=[object()], trainer_state=object())
    [second] = call(function, ["a"])
    assert first == second != os.getpid()
    function.close()
    assert call(function, ["a"]) != [first]
    function.close()


def test_async_functions_and_columns() -> None:
    function = in_process(slow_rewards.lengths)
    assert call(function, ["abc", "\u00e9"], answer=["12", "3"]) == [3.2, 1.1]
    with pytest.raises(DataError, match="column 'answer' cannot go to another process"):
        call(function, ["abc"], answer=[object()])
    function.close()


def test_workers_work_at_once() -> None:
    function = in_process(slow_rewards.nap, workers=3)

    async def three(seconds: str) -> list[Any]:
        return await asyncio.gather(*(function(completions=[seconds]) for _ in range(3)))

    asyncio.run(three("0"))
    start = time.perf_counter()
    assert asyncio.run(three("0.4")) == [[None]] * 3
    assert time.perf_counter() - start < 0.9
    function.close()


def test_errors_deaths_and_overruns_are_told_and_survived() -> None:
    broken = in_process(slow_rewards.broken)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        call(broken, ["1", "0"])
    assert call(broken, ["2"]) == [0.5]
    broken.close()
    deadly = in_process(slow_rewards.deadly)
    with pytest.raises(ProcessDied, match="ended"):
        call(deadly, ["1"])
    nap = in_process(slow_rewards.nap, timeout=0.3)
    call(nap, ["0"])
    with pytest.raises(ProcessDied, match=r"overran 0\.3 s"):
        call(nap, ["30"])
    assert call(nap, ["0"]) == [None]
    nap.close()


def test_what_cannot_be_imported_by_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="move it to a file"):
        in_process(lambda completions, **_: [0.0])
    with pytest.raises(ConfigError, match="workers got 0"):
        in_process(slow_rewards.nap, workers=0)


def test_a_script_without_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, slow_rewards\n"
        "from eapo_fast.rewards import in_process\n"
        "print('once', flush=True)\n"
        "function = in_process(slow_rewards.lengths)\n"
        "async def main(): return await function(completions=['a'], answer=['b'])\n"
        "print(asyncio.run(main()))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert (done.stdout, done.stderr) == ("once\n[1.1]\n", "")
