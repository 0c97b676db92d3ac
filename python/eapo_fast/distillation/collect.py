"""Ask an expert for whole solutions and keep the right ones."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eapo_fast.data import load_dataset, require_column
from eapo_fast.errors import DataError
from eapo_fast.evaluation.folder import write_lines
from eapo_fast.evaluation.run import problem_text
from eapo_fast.evaluation.settings import json_digest
from eapo_fast.experts import ConsultHandle, ConsultPolicy, ConsultRequest, ConsultScheduler, Expert
from eapo_fast.rewards import verify

SYSTEM = "Solve the problem step by step and put the final answer in \\boxed{}."
"""System text of an expert that is asked for solutions; its prompt is `{query}`."""
MAX_REPLY_TOKENS = 4096
_IN_FLIGHT = 64
_TELL_EVERY = 100


def collect_solutions(
    data: Any,
    expert: Expert,
    folder: str | Path,
    *,
    samples: int = 1,
    timeout: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return a JSONL file of solutions whose answers are right, made by asking the expert.

    Replies are kept in `expert-replies.sqlite` as they come, so an interrupted collection goes on
    without asking again; a finished one is read back. What was cut at the reply cap, failed or is
    not certainly correct is left out.

    Args:
        data: problems with reference answers.
        expert: asked with the problem as the query: `OpenAICompatible(url, model, system=SYSTEM,
            prompt="{query}", max_reply_tokens=MAX_REPLY_TOKENS)`, for example.
        folder: where both files go; made if it is not there.
        samples: solutions to ask for per problem (for an expert that samples).
        timeout: seconds of one reply.
        progress: called with a line of text now and then.

    Raises:
        DataError: problems without answers; no reply was right.
    """
    tell = progress or (lambda line: None)
    rows = load_dataset(data, name="data")
    require_column(rows, "answer", needed_by="choosing solutions")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    identity = [rows, str(getattr(expert, "identity", type(expert).__qualname__)), samples]
    path = place / f"solutions-{json_digest(identity)[:12]}.jsonl"
    if path.is_file():
        tell(f"solutions: {path} is there already")
        return path
    policy = ConsultPolicy(
        timeout=timeout,
        cache=place / "expert-replies.sqlite",
        max_concurrency=_IN_FLIGHT,
        max_reply_tokens=MAX_REPLY_TOKENS,
    )
    counts: Counter[str] = Counter()
    with ConsultScheduler(expert, policy) as scheduler:
        kept = list(_right(_asked(scheduler, rows, samples), counts, len(rows) * samples, tell))
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    if not kept:
        raise DataError(f"data: no solution of the expert is right ({what})")
    tell(f"solutions: {what}")
    write_lines(path, kept)
    return path


def _asked(
    scheduler: ConsultScheduler, rows: Sequence[Mapping[str, Any]], samples: int
) -> Iterator[tuple[Mapping[str, Any], ConsultHandle]]:
    """Yield handles in order, with never more under way than are in flight: none waits its turn."""
    waiting: deque[tuple[Mapping[str, Any], ConsultHandle]] = deque()
    for index, row in enumerate(rows):
        for sample in range(samples):
            request = ConsultRequest(
                problem_text(row["prompt"]), prompt=index, rollout=sample, sample_index=sample
            )
            waiting.append((row, scheduler.submit(request)))
            if len(waiting) >= _IN_FLIGHT:
                yield waiting.popleft()
    yield from waiting


def _right(
    asked: Iterator[tuple[Mapping[str, Any], ConsultHandle]],
    counts: Counter[str],
    total: int,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    for number, (row, handle) in enumerate(asked, start=1):
        result = handle.result()
        outcome = str(result.status)
        if result.accepted:
            verdict = verify(result.text, str(row["answer"]))
            outcome = "cut" if result.truncated else verdict.status
        counts[outcome] += 1
        if outcome == "correct":
            yield {**row, "solution": result.text}
        if number % _TELL_EVERY == 0:
            tell(f"solutions: {number}/{total} asked, {counts['correct']} right")
