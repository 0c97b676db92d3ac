from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.experts import (
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    Expert,
    ExpertReply,
    Function,
    Recorded,
    ReplayMismatch,
    Usage,
)
from eapo_fast.experts.lines import sealed


def run(expert: Expert, policy: ConsultPolicy, count: int = 40) -> list[ConsultResult]:
    with ConsultScheduler(expert, policy, seed=9) as desk:
        handles = [
            desk.submit(ConsultRequest(f"q{i % 7}", "p", step=2, rollout=i)) for i in range(count)
        ]
        desk.flush()
        return [handle.result(5.0) for handle in handles]


def teacher(request: ConsultRequest) -> ExpertReply:
    if request.rollout % 5 == 0:
        return ExpertReply.failed("refused", "no", unfit=request.rollout == 5)
    return ExpertReply(f"hint for rollout {request.rollout}", Usage(3, 4), "teacher-1")


@pytest.mark.parametrize("gate", ["before_dispatch", "after_reply"])
def test_a_replay_gives_what_was_recorded(tmp_path: Path, gate: str) -> None:
    path = tmp_path / "sub" / "consults.jsonl"
    recording = ConsultPolicy(schedule="inverse", gate=gate, dedup="off", record=path)
    first = run(Function(teacher, immediate=True), recording)
    replayed = run(Recorded(path), ConsultPolicy(schedule="inverse"))
    assert [(r.status, r.text) for r in replayed] == [(r.status, r.text) for r in first]
    assert [r.trace.unfit for r in replayed] == [r.trace.unfit for r in first]
    assert sum(r.trace.unfit for r in first) == (first[5].status == "refused")
    assert {r.status for r in first} == {"ok", "declined", "refused"}


def test_an_unknown_request_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "consults.jsonl"
    run(Function(teacher, immediate=True), ConsultPolicy(record=path))
    with ConsultScheduler(Recorded(path)) as desk:
        desk.submit(ConsultRequest("never asked"))
        with pytest.raises(ReplayMismatch, match="never asked"):
            desk.flush()
    with ConsultScheduler(Recorded(path, strict=False)) as desk:
        assert desk.submit(ConsultRequest("never asked")).result().status == "refused"
        assert desk.submit(ConsultRequest("q1", "p", rollout=999)).result().status == "ok"


def test_a_torn_tail_is_dropped_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "consults.jsonl"
    run(Function(teacher, immediate=True), ConsultPolicy(record=path, dedup="off"), 10)
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert len(Recorded(path)) == 10
    path.write_text('{"query": 3}\n' + whole)
    with pytest.raises(DataError, match="line 1"):
        Recorded(path)
    with pytest.raises(DataError, match="cannot be read"):
        Recorded(tmp_path / "absent.jsonl")


def test_lines_taken_out_or_moved_are_noticed(tmp_path: Path) -> None:
    """Each line is sound; the same question has another reply at another place."""
    path = tmp_path / "consults.jsonl"
    policy = ConsultPolicy(record=path, dedup="off")
    for part in (3, 3):  # a second run goes on in the same file
        with ConsultScheduler(Function(teacher, immediate=True), policy) as desk:
            tape = desk.tape(part)
            for rollout in range(1, 4):
                desk.submit(ConsultRequest("same", "p", step=part, rollout=rollout)).result()
                tape.due(rollout, [(0, rollout, 0)], idle=False)
            tape.finish()
    whole = path.read_text().splitlines(keepends=True)
    assert len(Recorded(path)) == 3
    for changed in (
        whole[:2] + whole[3:],
        whole[1:],
        [whole[0], whole[2], whole[1], *whole[3:]],
        [*whole[:3], whole[2], *whole[3:]],
    ):
        path.write_text("".join(changed))
        with pytest.raises(DataError, match="taken out, put in, or moved"):
            Recorded(path)
    path.write_text("".join(whole[:-3]))  # the end is missing, as after a kill
    assert len(Recorded(path)) == 3


def test_a_step_that_was_not_recorded_does_not_run_freely(tmp_path: Path) -> None:
    path = tmp_path / "consults.jsonl"
    with ConsultScheduler(
        Function(teacher, immediate=True), ConsultPolicy(record=path, dedup="off")
    ) as desk:
        desk.tape(1).finish()
        desk.submit(ConsultRequest("q", rollout=1)).result()
    with ConsultScheduler(Recorded(path)) as desk, pytest.raises(ReplayMismatch):
        desk.tape(2).wait((0, 1, 0), 0.1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tick = {k: v for k, v in lines[0].items() if k not in ("n", "sum")} | {"kind": "tick"}
    path.write_text(sealed(tick | {"tick": 3}) + "\n")
    with pytest.raises(DataError, match="without its beginning"):
        Recorded(path)


def test_accepted_replies_are_bought_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def fn(request: ConsultRequest) -> ExpertReply:
        calls.append(request.query)
        return ExpertReply(f"r-{request.query}", Usage(1, 1), "m")

    policy = ConsultPolicy(cache=tmp_path / "deep" / "cache.sqlite")
    first = run(Function(fn, immediate=True), policy, 7)
    second = run(Function(fn, immediate=True), policy, 14)
    assert len(calls) == 7
    assert [r.text for r in second] == [r.text for r in first] * 2
    assert {r.status for r in second} == {"cached"}
    assert {(r.cost, r.usage, r.model) for r in second} == {(0.0, None, "m")}
    run(Function(fn, immediate=True, identity="another"), policy, 7)
    assert len(calls) == 14


def test_the_memory_cache_keeps_no_failures() -> None:
    policy = ConsultPolicy(cache="memory")
    with ConsultScheduler(Function(teacher, immediate=True), policy) as desk:
        statuses = [
            desk.submit(ConsultRequest("q", rollout=rollout)).result().status
            for rollout in (0, 5, 1, 2)
        ]
    assert statuses == ["refused", "refused", "ok", "cached"]


def test_a_damaged_cache_entry_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    policy = ConsultPolicy(cache=path)
    run(Function(lambda r: "fresh", immediate=True, identity="x"), policy, 3)
    with sqlite3.connect(path) as database:
        values = [json.loads(row[0]) for row in database.execute("SELECT value FROM replies")]
        database.execute("UPDATE replies SET value = '{\"text\": 5}'")
    database.close()
    assert {value["text"] for value in values} == {"fresh"}
    again = run(Function(lambda r: "fresh", immediate=True, identity="x"), policy, 3)
    assert {r.status for r in again} == {"ok"}


def test_places_that_cannot_be_written_are_configuration_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cache"):
        ConsultScheduler(Function(teacher), ConsultPolicy(cache=tmp_path / "file" / "c.sqlite"))
    with pytest.raises(ConfigError, match="record"):
        ConsultScheduler(Function(teacher), ConsultPolicy(record=tmp_path / "file" / "r.jsonl"))
