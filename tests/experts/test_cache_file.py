"""The SQLite cache among several runs: nobody waits for it, nothing is lost, nothing is damaged."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, Function
from eapo_fast.experts.base import ExpertReply
from eapo_fast.experts.sqlite_cache import SqliteCache


async def answer(request: ConsultRequest) -> str:
    await asyncio.sleep(0.01)
    return f"r {request.query}"


def desk(path: Path) -> ConsultScheduler:
    policy = ConsultPolicy(timeout=10.0, cache=path, max_concurrency=256)
    return ConsultScheduler(Function(answer, identity="one"), policy)


def asked(path: Path, count: int) -> Counter[str]:
    with desk(path) as one:
        handles = [one.submit(ConsultRequest(f"q{i}")) for i in range(count)]
        results = [handle.result(20.0) for handle in handles]
    assert [r.text for r in results] == [f"r q{i}" for i in range(count)]
    return Counter(r.status for r in results)


def test_a_file_that_another_process_holds_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    assert asked(path, 1) == {"ok": 1}
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    one = desk(path)
    handles = [one.submit(ConsultRequest(f"q{i}")) for i in range(1, 9)]
    assert {handle.result(20.0).status for handle in handles} == {"ok"}
    assert max(handle.result().latency for handle in handles) < 1.0
    again = [one.submit(ConsultRequest(f"q{i}")).result(20.0).status for i in range(9)]
    assert set(again) == {"cached"}
    other.execute("ROLLBACK")
    other.close()
    one.close()
    assert asked(path, 9) == {"cached": 9}


def test_runs_that_begin_and_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    counts: list[Counter[str]] = []
    threads = [
        threading.Thread(target=lambda: counts.append(asked(path, 200)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert len(counts) == 4
    assert asked(path, 200) == {"cached": 200}


def test_a_killed_run_leaves_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    program = (
        "import sys; from eapo_fast.experts.sqlite_cache import SqliteCache\n"
        "from eapo_fast.experts.base import ExpertReply\n"
        "cache = SqliteCache(sys.argv[1]); number = 0\n"
        "while True:\n"
        "    cache.put(f'k{number}', ExpertReply('x' * 50)); number += 1\n"
        "    if number == 3000: print('go', flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    child.kill()
    child.wait()
    child.stdout.close()
    cache = SqliteCache(path)
    found = [cache.get(f"k{i}") for i in range(50)]
    cache.put("new", ExpertReply("y"))
    cache.close()
    assert all(reply is None or reply.text == "x" * 50 for reply in found)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM replies WHERE key = 'new'").fetchone() == (1,)


def test_a_disk_that_refuses_is_reported_and_tried_again(tmp_path: Path) -> None:
    problems: list[Exception] = []
    cache = SqliteCache(tmp_path / "cache.sqlite", problems.append)
    cache._path = tmp_path / "gone" / "cache.sqlite"
    cache.put("a", ExpertReply("x"))
    end = time.monotonic() + 5.0
    while not problems and time.monotonic() < end:
        time.sleep(0.01)
    assert "unable to open" in str(problems[0])
    found = cache.get("a")
    assert found is not None
    assert found.text == "x"
    cache._path = tmp_path / "cache.sqlite"
    cache.close()
    again = SqliteCache(tmp_path / "cache.sqlite")
    assert again.get("a") == ExpertReply("x")
    again.close()


def test_what_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_text("these are the notes of last Tuesday, not a database " * 100)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteCache(path)
    assert time.monotonic() - start < 2.0
