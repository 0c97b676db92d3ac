"""An evaluation as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from eapo_fast.evaluation.store import PICTURE, PROBLEMS, RESULT, Record
from eapo_fast.reporting.stats import clock, compact


def result_text(result: Mapping[str, Any]) -> str:
    """Return what `eapo-fast eval` prints at the end."""
    results = result["results"]
    n, tokens = results["n"], results["tokens"]
    lines = [
        f"{result['title']}: {result['model']} on {result['data']}",
        f"{results['problems']} problems, {n} samples each ({result['kind']})",
        "",
        f"mean@{n:<5} {interval_text(results['mean_at_n'])}",
    ]
    if n > 1:
        lines += [
            f"any@{n:<6} {interval_text(results['any_at_n'])}",
            f"maj@{n:<6} {interval_text(results['maj_at_n'])}",
            f"{'Var':<10} {results['var']['value']:.4f}",
        ]
    for column, groups in results["by"].items():
        lines += [""] + [
            f"{column} {g['value']}: {interval_text(g['mean_at_n'])} of {g['problems']}"
            for g in groups
        ]
    lines += [
        "",
        f"tokens     {compact(tokens['mean'])} a sample (median {compact(tokens['median'])}, "
        f"longest {compact(tokens['max'])}); {_percent(results['truncated'])} cut off",
        f"answers    {_percent(results['no_answer'])} without one, "
        f"{_percent(results['undecided'])} undecided",
    ]
    if result["kind"] == "assisted":
        lines.append(f"consults   {_consults(results['consults'])}")
    return "\n".join([*lines, _where(result)])


def interval_text(estimate: Mapping[str, Any]) -> str:
    """Return `46.1 % [41.0, 51.3]`."""
    if estimate["low"] is None:
        return _percent(estimate["value"])
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{_percent(estimate['value'])} [{low:.1f}, {high:.1f}]"


def progress_line(file: TextIO) -> Any:
    """Return a `progress` for `evaluate_model` that writes a line per chunk."""

    def show(records: Sequence[Record], fresh: int, total: int, seconds: float) -> None:
        done, n = len(records), len(records[0]["correct"])
        mean = sum(sum(r["correct"]) for r in records) / (done * n)
        left = f", about {clock((total - done) * seconds / fresh)} left" if done < total else ""
        line = f"{done}/{total} problems  mean@{n} {_percent(mean)}  {clock(seconds)}{left}\n"
        file.write(line)
        file.flush()

    return show


def _consults(consults: Mapping[str, Any]) -> str:
    text = (
        f"{consults['asked_per_sample']:.2f} asked and {consults['accepted_per_sample']:.2f} "
        f"answered a sample; {_percent(consults['samples_that_asked'])} of the samples asked"
    )
    failed = {k: v for k, v in consults["by_status"].items() if k not in ("ok", "cached")}
    if failed:
        text += "; not answered: " + ", ".join(f"{v} {k}" for k, v in failed.items())
    return text


def _where(result: Mapping[str, Any]) -> str:
    timing = result["timing"]
    return (
        f"time       {clock(timing['seconds'])} sampling, "
        f"{compact(timing['policy_tokens_per_s'])} tokens/s\n"
        f"results    {result['folder']}/  ({RESULT}, {PROBLEMS}, {PICTURE})"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
