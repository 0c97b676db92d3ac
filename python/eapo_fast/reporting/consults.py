"""`eapo-fast consults`: the slowest, dearest and failed consults of a run, and one again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eapo_fast.errors import ConfigError, DataError, suggest
from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, ExpertReply, Function
from eapo_fast.experts.lines import digest, read_sealed

Line = dict[str, Any]
GOOD = ("ok", "cached", "declined")
_QUERY = 44


def consult_report(run_dir: Path, top: int = 10) -> str:
    """The report over `run_dir/consults.jsonl`; DataError if it is missing or damaged."""
    lines = _consults(run_dir)
    parts = [_totals(lines)]
    slow = sorted((one for one in lines if one["latency"] > 0), key=lambda one: -one["latency"])
    dear = sorted((one for one in lines if _price(one) > (0, 0)), key=_price, reverse=True)
    failed = [one for one in lines if one["status"] not in GOOD]
    parts.append(_table("slowest", slow[:top], "no consult took any time (in-process expert)"))
    parts.append(_table("dearest", dear[:top], "no consult used tokens or money"))
    parts.append(_table(f"failed ({len(failed)})", failed[-top:], "none"))
    return "\n\n".join(parts)


def replay_consult(run_dir: Path, name: str) -> str:
    """One consult put through a scheduler again, from its line alone; no expert is asked.

    Raises:
        ConfigError: no consult of that name; DataError: what comes out is not what was recorded.
    """
    line = _find(run_dir, name)
    policy = ConsultPolicy(max_reply_tokens=1 << 20)
    reply = ExpertReply(line["text"], model=line["model"], status=line["status"])
    with ConsultScheduler(Function(lambda request: reply, immediate=True), policy) as desk:
        result = desk.submit(request_of(line)).result()
    if digest(result.text) != line["reply"]:
        raise DataError(f"consult {name}: the replayed reply is not the recorded one")
    return "\n".join([*_story(line), f"replayed   {result.status}, the same reply to the byte"])


def ask_again(run_dir: Path, name: str, expert: Any) -> str:
    """One consult put to a live expert, beside what was answered then."""
    line = _find(run_dir, name)
    with ConsultScheduler(expert) as desk:
        handle = desk.submit(request_of(line))
        desk.flush()
        result = handle.result()
    now = f"asked now  {result.status} in {result.latency:.2f} s: {result.text or result.detail}"
    return "\n".join([*_story(line), now])


def request_of(line: Line) -> ConsultRequest:
    """The request that a line is about."""
    names = ("step", "prompt", "rollout", "turn", "index", "sample_index")
    return ConsultRequest(line["query"], line["problem"], **{name: line[name] for name in names})


def _consults(run_dir: Path) -> list[Line]:
    lines = read_sealed(run_dir / "consults.jsonl")
    return [line for line in lines if line["kind"] == "consult"]


def _find(run_dir: Path, name: str) -> Line:
    lines = {line["id"]: line for line in _consults(run_dir)}
    if name not in lines:
        hint = suggest(name, list(lines))
        raise ConfigError(
            f"{run_dir} has no consult {name!r} (step/prompt/rollout/turn/query).{hint}"
        )
    return lines[name]


def _price(line: Line) -> tuple[float, int]:
    usage = line["usage"] or [0, 0, 0.0]
    return line["charged"], usage[0] + usage[1]


def _totals(lines: Sequence[Line]) -> str:
    statuses = Counter(line["status"] for line in lines)
    experts = Counter(line["expert"] for line in lines if line["expert"])
    sources = Counter(line["source"] for line in lines)
    leaks = sum(line["leak"] is True for line in lines)
    money, tokens = (sum(_price(line)[i] for line in lines) for i in (0, 1))
    rows = [
        f"{len(lines)} consults: {_counts(statuses)}",
        f"answered by: {_counts(sources)}" + (f"; members: {_counts(experts)}" if experts else ""),
        f"{tokens} tokens, {money:.6g} money; {leaks} replies state the gold answer",
    ]
    return "\n".join(rows)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _table(title: str, lines: Iterable[Line], empty: str) -> str:
    rows = [_row(line) for line in lines]
    head = f"{'id':<16} {'status':<9} {'seconds':>8} {'tries':>5} {'tokens':>7} {'money':>9}  query"
    return "\n".join([title, *([head, *rows] if rows else [empty])])


def _row(line: Line) -> str:
    money, tokens = _price(line)
    query = " ".join(str(line["query"]).split())
    query = query if len(query) <= _QUERY else query[: _QUERY - 3] + "..."
    detail = f"  [{line['detail']}]" if line["detail"] and line["status"] not in GOOD else ""
    return (
        f"{line['id']:<16} {line['status']:<9} {line['latency']:>8.3f} {len(line['attempts']):>5} "
        f"{tokens:>7} {money:>9.6g}  {query}{detail}"
    )


def _story(line: Line) -> list[str]:
    rows = [
        f"consult    {line['id']} (step/prompt/rollout/turn/query), run {line['run']}",
        f"problem    {line['problem']}",
        f"query      {line['query']}",
        f"status     {line['status']} {line['detail']}".rstrip(),
        f"reply      {line['text']}",
        f"by         {line['expert'] or line['model'] or '-'} ({line['source']}), "
        f"{line['latency']:.3f} s, transforms: {', '.join(line['transforms']) or 'none'}",
    ]
    for start, seconds, status, expert, hedge in line["attempts"]:
        kind = "hedge" if hedge else "call"
        rows.append(f"  {kind} at {start:.3f} s, {seconds:.3f} s: {status} {expert or ''}".rstrip())
    segment, span = line["segment"], line["span"]
    rows.append(
        f"tokens     {span[0]} to {span[1]} of the rollout (segment {segment[0]} to {segment[1]}), "
        f"after engine step {line['tick']}"
    )
    return rows
