"""Collect multi-turn rollouts: decode, park, consult, inject, decode on.

No row waits for another's expert: a row that closes a consult block leaves the batch, its queries
go to the scheduler, and its reply joins as one chunk of masked tokens when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eapo_fast.engine import Sampler, SamplingParams, Session, Vocabulary
from eapo_fast.errors import ConfigError
from eapo_fast.experts import (
    ConsultHandle,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
)
from eapo_fast.experts.tape import Tape
from eapo_fast.rollout.injection import compose
from eapo_fast.rollout.protocol import ConsultProtocol
from eapo_fast.rollout.rules import consult_rules, foreign_tokens, solo_rules
from eapo_fast.rollout.types import FinishReason, Injection, Rollout, Segment, SegmentKind

_POLL_SECONDS = 1.0


@dataclass(slots=True)
class _Trajectory:
    """A row on its way to a `Rollout`."""

    prompt: int
    sample: int
    prompt_id: int
    turn: int = 0
    turn_start: int = 0
    kinds: list[SegmentKind] = field(default_factory=list)
    requests: list[ConsultRequest] = field(default_factory=list)
    results: list[ConsultResult] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    pending: list[ConsultHandle] = field(default_factory=list)

    @property
    def row(self) -> tuple[int, int, int]:
        """(prompt, rollout, turn): the name of what it waits for."""
        return (self.prompt_id, self.sample, self.turn)


def collect_rollouts(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    protocol: ConsultProtocol | None = None,
    scheduler: ConsultScheduler | None = None,
    step: int = 1,
    prompt_ids: Sequence[int] | None = None,
    problems: Sequence[str] | None = None,
    on_group: Callable[[list[Rollout]], None] | None = None,
) -> list[Rollout]:
    """Sample `params.n` rollouts of every prompt, answering their consults.

    Args:
        sampler: engine over the policy's parameters; with a tokenizer when a protocol is given.
        prompts: token ids of each prompt.
        params: how to sample; `max_tokens` counts policy tokens over all turns.
        protocol: how consults are written; None with a scheduler means the default protocol.
            A protocol without a scheduler is solo sampling: the opening tag is banned.
        scheduler: answers consults; None means that none is possible.
        step: training step, part of every random key and of the gate's schedule.
        prompt_ids: names of the prompts in the random keys; None: list index.
        problems: text handed to the expert beside the query; None: the decoded prompt.
        on_group: called with a prompt group as soon as its last rollout has ended.

    Returns:
        Rollouts ordered by prompt, then sample.

    Raises:
        ConfigError: a protocol without a tokenizer, or a bad prompt.
    """
    if protocol is None and scheduler is not None:
        protocol = ConsultProtocol()
    if protocol is not None and sampler.vocabulary is None:
        raise ConfigError("consults need a tokenizer: Sampler(model, tokenizer)")
    foreign = foreign_tokens(sampler, protocol, scheduler)
    with sampler.session(prompts, params, foreign_tokens=foreign) as session:
        run = _Collection(sampler, session, params, protocol, scheduler, step, on_group)
        run.add(prompts, prompt_ids or range(len(prompts)), problems)
        run.decode()
    return run.rollouts()


class _Collection:
    """The rows of one `collect_rollouts` call."""

    def __init__(
        self,
        sampler: Sampler,
        session: Session,
        params: SamplingParams,
        protocol: ConsultProtocol | None,
        scheduler: ConsultScheduler | None,
        step: int,
        on_group: Callable[[list[Rollout]], None] | None,
    ) -> None:
        self.session = session
        self.params = params
        self.protocol = protocol
        self.scheduler = scheduler
        self.step = step
        self.on_group = on_group
        self.vocabulary: Vocabulary | None = sampler.vocabulary
        base = sampler.rules_of(params)
        self.may_consult = consult_rules(base, protocol)
        self.alone = solo_rules(base, protocol)
        self.prompts: list[list[int]] = []
        self.problems: list[str] = []
        self.trajectories: dict[int, _Trajectory] = {}
        self.parked: dict[int, _Trajectory] = {}
        self.groups: list[list[Rollout | None]] = []
        self.tape = scheduler.tape(step) if scheduler is not None else Tape()
        session.pinned_rate = self.tape.replays
        self.tick = 0

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        problems: Sequence[str] | None,
    ) -> None:
        """Queue every prompt group."""
        self.prompts = [list(p) for p in prompts]
        self.groups = [[None] * self.params.n for _ in prompts]
        self.problems = list(problems) if problems is not None else self._decoded_prompts()
        rules = self.may_consult if self._turns_left(0) else self.alone
        for index, (prompt, name) in enumerate(zip(self.prompts, prompt_ids, strict=True)):
            ids = self.session.add_group(prompt, self.params, rules, prompt_id=name, step=self.step)
            for sample, seq in enumerate(ids):
                self.trajectories[seq] = _Trajectory(index, sample, name)

    def decode(self) -> None:
        """Run until every rollout has ended."""
        while self.session.unfinished:
            events = self.session.step()
            self.tick += events is not None
            self.session.believe_rate(self.tape.rate(self.tick, self.session.prefill_rate))
            for event in events or ():
                self._handle(event)
            self._answer(idle=events is None)
        self.tape.finish()

    def rollouts(self) -> list[Rollout]:
        """Return all rollouts, ordered by prompt and sample."""
        return [r for group in self.groups for r in group if r is not None]

    def _decoded_prompts(self) -> list[str]:
        if self.vocabulary is None:
            return [""] * len(self.prompts)
        return [self.vocabulary.plain_text(p) for p in self.prompts]

    def _turns_left(self, turn: int) -> bool:
        """Whether a consult in this turn would leave a turn to use its reply in."""
        if self.protocol is None or self.scheduler is None:
            return False
        return turn + 1 < self.protocol.max_turns

    def _handle(self, event: Any) -> None:
        if event.kind == "finished":
            self._finish(event.seq)
        elif self._turns_left(self.trajectories[event.seq].turn):
            self._consult(event.seq)
        else:
            self.session.finish(event.seq, "turns")
            self._finish(event.seq)

    def _consult(self, seq: int) -> None:
        """Hand a parked row's queries to the scheduler, or answer a malformed block at once."""
        assert self.protocol is not None
        assert self.vocabulary is not None
        trajectory, row = self.trajectories[seq], self.session.row(seq)
        if row.mask.sum() >= self.params.max_tokens:
            self.session.finish(seq, "length")
            self._finish(seq)
            return
        tokens = row.token_ids[trajectory.turn_start :]
        queries = self.protocol.parse(self.vocabulary.text(int(t) for t in tokens))
        if queries is None:
            self._inject(seq, None)
            return
        assert self.scheduler is not None
        for index, query in enumerate(queries):
            request = ConsultRequest(
                query,
                self.problems[trajectory.prompt],
                step=self.step,
                prompt=trajectory.prompt_id,
                rollout=trajectory.sample,
                turn=trajectory.turn,
                index=index,
            )
            trajectory.requests.append(request)
            trajectory.pending.append(self.scheduler.submit(request))
        self.parked[seq] = trajectory
        wait = self.tape.wait(trajectory.row, self.scheduler.expected_wait())
        self.session.expect_wait(seq, wait)

    def _answer(self, *, idle: bool) -> None:
        """Inject every reply that is complete and due; with nothing to decode, wait for one."""
        if not self.parked or self.scheduler is None:
            return
        waiting = {t.row: s for s, t in self.parked.items()}
        self.scheduler.flush()
        ready = [row for row, seq in waiting.items() if self._answered(seq)]
        if idle and not ready:
            self.scheduler.wait(_POLL_SECONDS)
            ready = [row for row, seq in waiting.items() if self._answered(seq)]
        for row in self.tape.due(self.tick, ready, idle=idle):
            seq = waiting[row]
            self._inject(seq, [h.result() for h in self.trajectories[seq].pending])

    def _answered(self, seq: int) -> bool:
        return all(handle.done() for handle in self.trajectories[seq].pending)

    def _inject(self, seq: int, results: list[ConsultResult] | None) -> None:
        """Append the reply (None: malformed block) in-line and let the row go on."""
        assert self.protocol is not None
        assert self.vocabulary is not None
        assert self.scheduler is not None
        trajectory = self.trajectories[seq]
        limit = self.scheduler.policy.max_reply_tokens
        answer = compose(self.vocabulary, self.protocol, results, limit)
        start = len(self.session.row(seq).token_ids)
        trajectory.kinds.append(answer.kind)
        trajectory.results.extend(answer.results)
        trajectory.pending.clear()
        self.parked.pop(seq, None)
        runnable = self.session.inject(seq, answer.token_ids)
        written = len(self.session.row(seq).token_ids) - start
        trajectory.injections.append(
            Injection(
                turn=trajectory.turn,
                tick=self.tick,
                start=start,
                stop=start + written,
                spans=[(start + min(a, written), start + min(b, written)) for a, b in answer.spans],
            )
        )
        trajectory.turn += 1
        if not runnable:
            self._finish(seq)
            return
        trajectory.turn_start = start + written
        if not self._turns_left(trajectory.turn):
            self.session.set_rules(seq, self.alone)

    def _finish(self, seq: int) -> None:
        trajectory = self.trajectories.pop(seq)
        row = self.session.row(seq)
        self.session.release(seq)
        rollout = Rollout(
            prompt_ids=self.prompts[trajectory.prompt],
            token_ids=row.token_ids,
            loss_mask=row.mask,
            logprobs=row.logprobs,
            segments=segments_of(row.mask, trajectory.kinds),
            consults=trajectory.results,
            requests=trajectory.requests,
            injections=trajectory.injections,
            finish_reason=_checked(row.finish_reason),
            group_id=trajectory.prompt,
            sample_index=trajectory.sample,
            prompt_id=trajectory.prompt_id,
            banned=(row.ban_positions, row.ban_ids),
        )
        group = self.groups[trajectory.prompt]
        group[trajectory.sample] = rollout
        complete = [r for r in group if r is not None]
        if self.on_group is not None and len(complete) == len(group):
            self.on_group(complete)


def segments_of(mask: NDArray[np.uint8], kinds: Sequence[SegmentKind]) -> list[Segment]:
    """Cut [N] tokens at the borders of the mask; the i-th masked run has the kind `kinds[i]`."""
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    segments: list[Segment] = []
    turn = 0
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        kind: SegmentKind = "policy" if mask[start] else kinds[turn]
        segments.append(Segment(kind, start, stop, turn))
        turn += kind != "policy"
    return segments


def _checked(reason: str) -> FinishReason:
    allowed: tuple[FinishReason, ...] = ("stop", "length", "turns", "error")
    return next(r for r in allowed if r == reason)
