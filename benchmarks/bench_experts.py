"""What consulting costs: the scheduler itself, the overlap with decoding, and TRL's tool loop.

    python benchmarks/bench_experts.py [--trl-python PYTHON --trl-script FILE] [--out FILE]
    pytest benchmarks/bench_experts.py

`scheduler`: delay that the desk adds to an instant reply while 1,000 other consults are pending,
and consults a second through the calculator. `overlap`: 256 rollouts, a quarter of them consulting
an expert of log-normal delay (median 2 s, 99th percentile 20 s, scaled down by 20), against an
instant expert. `trl`: 64 rollouts that each ask an expert of 50 ms once; with an interpreter that
has TRL and a script that prints TRL's times as JSON, both are measured in one run. Values are
checked before times.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from eapo_fast.engine import Sampler, SamplerConfig, SamplingParams
from eapo_fast.engine import session as engine_session
from eapo_fast.experts import (
    Calculator,
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    ExpertReply,
    Function,
)
from eapo_fast.rollout import ConsultProtocol, Rollout, collect_rollouts

PENDING, PROBES = 1000, 400
BAR_ADDED, BAR_RATE, BAR_OVERLAP, BAR_TRL = 1e-3, 10_000.0, 0.95, 20.0
ROLLOUTS, TOKENS, SCALE = 256, 256, 20.0
MEDIAN, P99 = 2.0, 20.0
WORDS = (
    "<consult>",
    "</consult>",
    "<q>",
    "</q>",
    "<advice>",
    "</advice>",
    '<a i="1">',
    "</a>",
    "hint",
)
BLOCK = ("<consult>", "<q>", "hint", "</q>", "</consult>")
REPLY = " ".join(["hint"] * 32)


class Crowded:
    """Answers "quick" at once and nothing else ever."""

    max_batch_size = 1

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        if requests[0].query.startswith("quick"):
            return [ExpertReply(requests[0].query)]
        await asyncio.sleep(3600.0)
        return []


def added_delay(pending: int = PENDING, probes: int = PROBES) -> dict[str, float]:
    """Seconds from `submit` to the result of an instant reply, others pending."""
    policy = ConsultPolicy(timeout=600.0, max_concurrency=pending + 8)
    delays = []
    with ConsultScheduler(Crowded(), policy) as desk:
        held = [desk.submit(ConsultRequest(f"hang {i}", rollout=i)) for i in range(pending)]
        for number in range(probes):
            start = time.perf_counter()
            result = desk.submit(ConsultRequest(f"quick {number}", turn=number)).result(10.0)
            delays.append(time.perf_counter() - start)
            assert (result.status, result.text) == ("ok", f"quick {number}")
        assert not any(handle.done() for handle in held)
    delays.sort()
    return {"median_s": statistics.median(delays), "p99_s": delays[int(0.99 * len(delays))]}


def calculator_rate(count: int = 20_000) -> float:
    """Consults a second from `submit` to the result, each a calculation of its own."""
    requests = [
        ConsultRequest(f"{i}*7+{i % 13}", "a problem", rollout=i % 64, turn=i) for i in range(count)
    ]
    with ConsultScheduler(Calculator(), ConsultPolicy(schedule="inverse")) as desk:
        start = time.perf_counter()
        handles = [desk.submit(request) for request in requests]
        desk.flush()
        results = [handle.result() for handle in handles]
        spent = time.perf_counter() - start
    assert all(r.text == str(i * 7 + i % 13) for i, r in enumerate(results))
    return count / spent


def tokenizer() -> Any:
    """Words w0 to w246 and the tags, each one token."""
    words = [*WORDS, *(f"w{i}" for i in range(256 - len(WORDS)))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    from tokenizers import pre_tokenizers

    core.pre_tokenizer = pre_tokenizers.Split(
        __import__("tokenizers").Regex(r'<a i="1">|<[^>]*>|\s+|[^\s<]+'), "isolated"
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def model() -> Any:
    """A random Qwen2 of 1 M parameters (that of the TRL script)."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


class Forced:
    """Makes chosen rollouts write a consult block at a chosen place; times the engine's steps."""

    def __init__(self, places: dict[int, int], tags: list[int]) -> None:
        self.places = places
        self.tags = tags
        self.written: dict[int, int] = {}
        self.seqs: list[int] = []
        self.steps: list[tuple[float, float, int]] = []

    def __enter__(self) -> Forced:
        self._sample, self._step = engine_session.sample, engine_session.Session.step
        forced = self

        def sample(logits: Any, **options: Any) -> Any:
            tokens, logprobs, kept = forced._sample(logits, **options)
            tokens[tokens < len(WORDS)] = len(WORDS)  # no tag by chance
            for row, seq in enumerate(forced.seqs):
                at = forced.written.get(seq, 0)
                forced.written[seq] = at + 1
                offset = at - forced.places.get(seq, 1 << 30)
                if 0 <= offset < len(forced.tags):
                    tokens[row] = forced.tags[offset]
            return tokens, logprobs, kept

        def step(session: Any) -> Any:
            if not isinstance(session.scheduler, _Noted):
                session.scheduler = _Noted(session.scheduler, forced)
            start = time.perf_counter()
            events = forced._step(session)
            if events is not None:
                forced.steps.append((start, time.perf_counter(), len(forced.seqs)))
            return events

        engine_session.sample = sample
        engine_session.Session.step = step  # type: ignore[method-assign]
        return self

    def outside(self) -> float:
        """Seconds between the first engine step and the last that were not spent in one."""
        whole = self.steps[-1][1] - self.steps[0][0]
        return whole - sum(end - start for start, end, _ in self.steps)

    def rates(self) -> tuple[float, float, float]:
        """(tokens a second until all rollouts wait, over the whole run, engine's share until then).

        All wait when the gap between two steps is a wait for replies: 20 ms and two steps long.
        """
        steps = self.steps
        typical = statistics.median(end - start for start, end, _ in steps)
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(steps)]
        first = next((i for i, g in enumerate(gaps) if g > max(0.02, 2 * typical)), len(gaps))
        until = steps[: first + 1]
        span = until[-1][1] - until[0][0]
        inside = sum(end - start for start, end, _ in until)
        whole = sum(rows for *_, rows in steps) / (steps[-1][1] - steps[0][0])
        return sum(rows for *_, rows in until) / span, whole, inside / span

    def __exit__(self, *exc: object) -> None:
        engine_session.sample = self._sample
        engine_session.Session.step = self._step  # type: ignore[method-assign]


class _Noted:
    def __init__(self, scheduler: Any, forced: Forced) -> None:
        self._scheduler = scheduler
        self._forced = forced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def plan(self) -> Any:
        plan = self._scheduler.plan()
        self._forced.seqs = [] if plan is None else plan.sample_seqs.tolist()
        return plan


def collect(
    expert: Any, rollouts: int, consulting: int, tokens: int, places: Callable[[int], int]
) -> tuple[list[Rollout], float, Forced]:
    """Run `rollouts` rollouts, of which the first `consulting` of each four or all consult once."""
    words = tokenizer()
    sampler = Sampler(model(), words, SamplerConfig(max_batch=256))
    tags = [words.convert_tokens_to_ids(word) for word in BLOCK]
    every = rollouts // consulting
    chosen = {seq: places(seq) for seq in range(0, rollouts, every)}
    prompts = [[100 + i, 101, 102, 103] for i in range(rollouts // 8)]
    params = SamplingParams(max_tokens=tokens, n=8, seed=1)
    policy = ConsultPolicy(timeout=60.0, max_concurrency=256, dedup="off", max_reply_tokens=64)
    protocol = ConsultProtocol(max_turns=2, max_queries=1)
    with ConsultScheduler(expert, policy) as desk, Forced(chosen, tags) as forced:
        start = time.perf_counter()
        done = collect_rollouts(sampler, prompts, params, protocol=protocol, scheduler=desk)
        wall = time.perf_counter() - start
    assert len(done) == rollouts
    assert sum(len(r.consults) for r in done) == consulting
    assert all(c.status == "ok" and c.text == REPLY for r in done for c in r.consults)
    assert all(r.num_policy_tokens == tokens for r in done)
    return done, wall, forced


def lognormal_expert(seed: int, scale: float) -> Function:
    """Answers after a log-normal delay drawn by the rollout; `scale` 0: at once."""
    sigma = math.log(P99 / MEDIAN) / 2.3263

    async def answer(request: ConsultRequest) -> str:
        if scale:
            draw = random.Random(f"{seed} {request.prompt} {request.rollout}")
            await asyncio.sleep(draw.lognormvariate(math.log(MEDIAN), sigma) / scale)
        return REPLY

    return Function(answer)


def overlap(rollouts: int = ROLLOUTS, tokens: int = TOKENS, repeats: int = 7) -> dict[str, Any]:
    """Tokens a second with a slow expert as a share of those with an instant one.

    `aside` leaves out the time in which no rollout could decode and the rest of the run after the
    first such moment (the wait for the last replies); `whole` leaves out nothing.
    """
    shares: list[tuple[float, float]] = []
    busy: list[float] = []
    for repeat in range(repeats):
        place = random.Random(repeat)
        at = {seq: place.randint(8, tokens // 2) for seq in range(rollouts)}
        rates = {}
        pair = [("instant", 0.0), ("slow", SCALE)]
        for name, scale in pair if repeat % 2 == 0 else pair[::-1]:
            expert = lognormal_expert(repeat, scale)
            _, _, forced = collect(expert, rollouts, rollouts // 4, tokens, at.__getitem__)
            rates[name] = forced.rates()
        slow, instant = rates["slow"], rates["instant"]
        shares.append((slow[0] / instant[0], slow[1] / instant[1]))
        busy.append(slow[2])
    return {
        "share_aside": round(statistics.median(s[0] for s in shares), 3),
        "share_whole": round(statistics.median(s[1] for s in shares), 3),
        "shares_aside": [round(s[0], 3) for s in shares],
        "busy_while_runnable": round(min(busy), 4),
    }


def consult_part(rollouts: int = 64, tokens: int = 128, repeats: int = 5) -> float:
    """Seconds of a step with a 50 ms consult in each rollout that are not spent in the engine."""

    async def answer(request: ConsultRequest) -> str:
        await asyncio.sleep(0.05)
        return REPLY

    spent = []
    for _ in range(repeats):
        _, _, forced = collect(Function(answer), rollouts, rollouts, tokens, lambda seq: 59)
        spent.append(forced.outside())
    return statistics.median(spent)


def trl_consult_part(python: str, script: str, threads: int) -> tuple[float, dict[str, Any]]:
    """The same seconds in TRL's tool loop, and what its script printed."""
    command = [python, script, "--consults", "1", "--steps", "6", "--warmup", "2"]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["consults_per_step"] == result["completions_per_step"] == 64
    return float(result["waiting_for_expert_s"]), result


def bench_added_delay(benchmark: Any) -> None:
    """Under a millisecond at the median with 1,000 consults pending."""
    result = benchmark.pedantic(added_delay, rounds=1)
    benchmark.extra_info.update(result)
    assert result["median_s"] < BAR_ADDED


def bench_calculator(benchmark: Any) -> None:
    """10,000 consults a second."""
    rate = max(calculator_rate(), benchmark.pedantic(calculator_rate, rounds=1))
    benchmark.extra_info["consults_per_s"] = rate
    assert rate > BAR_RATE


def bench_overlap(benchmark: Any) -> None:
    """At least 95 % of the tokens a second of an instant expert."""
    result = benchmark.pedantic(overlap, rounds=1)
    benchmark.extra_info.update(result)
    assert result["share_aside"] > BAR_OVERLAP


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["scheduler", "overlap", "trl"])
    parser.add_argument("--trl-python", help="interpreter that can import trl")
    parser.add_argument("--trl-script", help="script that measures TRL and prints JSON")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, TRL's too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.only in (None, "scheduler"):
        delay = added_delay()
        result["added_delay_ms"] = {k: round(1e3 * v, 3) for k, v in delay.items()}
        result["calculator_consults_per_s"] = round(max(calculator_rate() for _ in range(3)))
    if options.only in (None, "overlap"):
        result["overlap"] = overlap()
    if options.only in (None, "trl"):
        ours = consult_part()
        result["consult_part_s"] = round(ours, 4)
        if options.trl_python and options.trl_script:
            theirs, printed = trl_consult_part(
                options.trl_python, options.trl_script, options.threads
            )
            result["trl"] = {
                "consult_part_s": theirs,
                "ratio": round(theirs / ours, 1),
                "versions": printed["versions"],
                "figures_from": printed["figures_from"],
            }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
