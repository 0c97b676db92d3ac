"""One line for each consult: what was asked, what came of it, and which tokens it put in.

The tokens that the engine put into a rollout and these lines map to each other: every span of a
line is a run of masked tokens, and every such run belongs to the lines of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eapo_fast.experts import ConsultRequest, ConsultResult
from eapo_fast.experts.lines import digest
from eapo_fast.rollout.types import Injection, Rollout


def consult_lines(
    rollout: Rollout, *, run: str, step: int, leaks: Sequence[bool | None] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a rollout, ready to be sealed.

    Args:
        rollout: with its injections.
        run: name of the run.
        step: step of the generation.
        leaks: for each consult, whether its reply states the gold answer; None: unknown.
    """
    consults = iter(zip(rollout.requests, rollout.consults, strict=True))
    flags = iter([*leaks, *[None] * (len(rollout.consults) - len(leaks))])
    for injection in rollout.injections:
        place = {
            "run": run,
            "step": step,
            "prompt": rollout.prompt_id,
            "rollout": rollout.sample_index,
            "turn": injection.turn,
        }
        where = {"tick": injection.tick, "segment": [injection.start, injection.stop]}
        if not injection.spans:
            yield (
                {"kind": "malformed_block", "id": _name(place), **place, **where}
                | _span(rollout, injection.start, injection.stop)
            )
        for start, stop in injection.spans:
            request, result = next(consults)
            line = {"kind": "consult", "id": _name(place, request), **place}
            yield (
                line
                | _asked(request, result)
                | _came(result)
                | where
                | {
                    **_span(rollout, start, stop),
                    "leak": next(flags),
                }
            )


def spans_of(rollout: Rollout) -> list[tuple[int, int]]:
    """The [start, stop) of every segment that the engine put in, from the mask alone."""
    padded = np.concatenate([[1], rollout.loss_mask, [1]]).astype(np.int8)
    change = np.diff(padded)
    starts, stops = np.flatnonzero(change == -1), np.flatnonzero(change == 1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def segment_of(injection: Injection) -> tuple[int, int]:
    """The [start, stop) of an injected segment."""
    return injection.start, injection.stop


def _name(place: dict[str, Any], request: ConsultRequest | None = None) -> str:
    parts = [place[key] for key in ("step", "prompt", "rollout", "turn")]
    return "/".join(map(str, [*parts, *([] if request is None else [request.index])]))


def _asked(request: ConsultRequest, result: ConsultResult) -> dict[str, Any]:
    return {
        "index": request.index,
        "sample_index": request.sample_index,
        "query": request.query,
        "problem": request.problem,
        "request": result.trace.key,
    }


def _came(result: ConsultResult) -> dict[str, Any]:
    trace, usage = result.trace, result.usage
    return {
        "status": result.status,
        "text": result.text,
        "reply": digest(result.text),
        "truncated": result.truncated,
        "transforms": list(trace.transforms),
        "expert": trace.expert,
        "model": result.model,
        "source": trace.source,
        "attempts": [[a.start, a.seconds, a.status, a.expert, a.hedge] for a in trace.attempts],
        "latency": result.latency,
        "usage": usage and [usage.prompt_tokens, usage.completion_tokens, usage.cost],
        "reserved": [trace.reserved_tokens, trace.reserved_cost],
        "charged": result.cost,
        "detail": result.detail,
    }


def _span(rollout: Rollout, start: int, stop: int) -> dict[str, Any]:
    tokens = np.ascontiguousarray(rollout.token_ids[start:stop], dtype="<i8").tobytes()
    return {"span": [start, stop], "tokens": digest(tokens)}
