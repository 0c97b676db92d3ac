"""The nouns of a rollout.

A worked example. The prompt is P; the policy writes A0 = `6*7=` `<consult>` ... `</consult>`, the
expert's reply comes in as E0, and the policy goes on with A1:

    token_ids  A0 A0 A0 A0 | E0 E0 | A1 A1
    loss_mask   1  1  1  1 |  0  0 |  1  1
    logprobs   -. -. -. -. |  0  0 | -. -.
    segments   Segment("policy", 0, 4, turn=0), Segment("expert", 4, 6, turn=0),
               Segment("policy", 6, 8, turn=1)

Nothing is ever re-tokenised: the ids that were sampled are the ids that are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eapo_fast.experts import ConsultRequest, ConsultResult

SegmentKind = Literal["policy", "expert", "notice"]
FinishReason = Literal["stop", "length", "turns", "error"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one provenance; `start` and `stop` index `Rollout.token_ids`."""

    kind: SegmentKind
    """policy: sampled; expert: an accepted reply; notice: declined, unavailable or malformed."""
    start: int
    stop: int
    turn: int
    """0 for the first turn; a reply has the turn of the consult that it answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """One segment that the engine put into a rollout, and whose tokens are whose."""

    turn: int
    """Turn of the consult that it answers."""
    tick: int
    """Engine steps done when it joined."""
    start: int
    """Start of the segment in `Rollout.token_ids`."""
    stop: int
    """End of the segment."""
    spans: list[tuple[int, int]]
    """[start, stop) in `Rollout.token_ids` of each query's tokens; empty for a malformed block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One trajectory after its prompt; all arrays have the length of `token_ids`, [N]."""

    prompt_ids: list[int]
    """Tokens of the prompt; never trained."""
    token_ids: NDArray[np.int64]
    """[N] every token after the prompt, whoever wrote it."""
    loss_mask: NDArray[np.uint8]
    """[N] 1 exactly on policy tokens."""
    logprobs: NDArray[np.float32]
    """[N] log-probability under the sampled distribution in nats; 0.0 where the mask is 0."""
    segments: list[Segment]
    """Provenance, in order, without gaps."""
    consults: list[ConsultResult] = field(default_factory=list)
    """What became of each query, in the order asked."""
    requests: list[ConsultRequest] = field(default_factory=list)
    """The queries themselves, beside `consults`."""
    injections: list[Injection] = field(default_factory=list)
    """What was put in, one for each segment that is not the policy's, in order."""
    finish_reason: FinishReason
    """stop, length (policy tokens or context used up), turns (a consult after the last turn) or
    error."""
    group_id: int
    """Prompt group: the index of the prompt in this collection."""
    sample_index: int
    """Position inside the group."""
    prompt_id: int
    """Name of the prompt in the random keys."""
    banned: tuple[NDArray[np.int32], NDArray[np.int32]]
    """Positions in `token_ids` and the token ids that had probability 0 there."""

    @property
    def num_policy_tokens(self) -> int:
        """Tokens with loss mask 1."""
        return int(self.loss_mask.sum())

    @property
    def num_turns(self) -> int:
        """Turns begun."""
        return 1 + sum(s.kind != "policy" for s in self.segments)

    def ids(self, kinds: Iterable[SegmentKind] = ("policy",), *, after: int = 0) -> list[int]:
        """Return the tokens of some kinds of segment that start at `after` or later."""
        wanted = set(kinds)
        parts = (s for s in self.segments if s.kind in wanted and s.start >= after)
        return [int(t) for s in parts for t in self.token_ids[s.start : s.stop]]

    def policy_text(self, decode: Callable[[Iterable[int]], str]) -> str:
        """Return what the policy wrote, replies and notices left out."""
        return decode(self.ids())

    def final_turn(self, decode: Callable[[Iterable[int]], str]) -> str:
        """Return the policy's text after the last reply: the only place for an answer."""
        last = max((s.stop for s in self.segments if s.kind != "policy"), default=0)
        return decode(self.ids(after=last))
