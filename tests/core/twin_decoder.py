"""What every row must become, decoded one token at a time: no batch, no blocks, no cache.

The model is fake: the KV of a token is a fingerprint of all tokens up to it, and the next token is
a pure function of (uniform, newest fingerprint, banned ids).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from twin_matcher import completing_tokens, first_match
from twin_random import sample_uniform


def fake_kv(token: int, before: int) -> int:
    """The KV of `token` behind a token with KV `before` (0 at the start)."""
    return zlib.crc32(token.to_bytes(4, "little"), before)


def fake_token(uniform: float, kv: int, banned: Collection[int], vocab_size: int) -> int:
    """The next token of the fake model behind a token with this KV; -1 if the KV is cursed."""
    if kv % CURSE == 0:
        return -1
    token = (kv + int(uniform * 2**24)) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def fake_logprob(uniform: float, length: int, temperature: float) -> float:
    """A log-probability that tells (uniform, length, temperature) from others."""
    return float(np.float32(-uniform - length - 1000 * temperature))


CURSE = 211
"""One in so many positions has no distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwinRules:
    """The arguments of Scheduler.add_rules."""

    stop_token_ids: tuple[int, ...] = ()
    stop_patterns: tuple[bytes, ...] = ()
    park_patterns: tuple[bytes, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    banned_patterns: tuple[bytes, ...] = ()


@dataclass(kw_only=True, slots=True)
class TwinRow:
    """One row and the rules of its life."""

    prompt: list[int]
    rules: TwinRules
    token_bytes: Sequence[bytes]
    max_tokens: int
    max_context: int
    key: tuple[int, int, int, int]
    """(seed, step, prompt_id, sample)"""
    temperatures: tuple[float, ...] = (1.0,)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    bans: list[tuple[int, int]] = field(default_factory=list)
    kv: list[int] = field(default_factory=list)
    """Of the prompt and all that follows."""
    segment_start: int = 0
    state: str = "runnable"
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self._extend_kv(self.prompt)

    def _extend_kv(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.kv.append(fake_kv(token, self.kv[-1] if self.kv else 0))

    @property
    def _text(self) -> bytes:
        return b"".join(self.token_bytes[t] for t in self.token_ids[self.segment_start :])

    def sample(self) -> tuple[str, int, int] | None:
        """Draws one token; returns (kind, pattern, overshoot) of the event, if there is one."""
        text, position = self._text, len(self.token_ids)
        banned = set(self.rules.banned_token_ids)
        banned |= set(completing_tokens(text, self.rules.banned_patterns, self.token_bytes))
        uniform = sample_uniform(*self.key, position)
        token = fake_token(uniform, self.kv[-1], banned, len(self.token_bytes))
        if token < 0:
            return self._finished("error", -1, 0)
        temperature = self.temperatures[min(sum(self.mask), len(self.temperatures) - 1)]
        self.bans += [(position, token) for token in sorted(banned)]
        self.token_ids.append(token)
        self.logprobs.append(fake_logprob(uniform, len(self.kv), temperature))
        self.mask.append(1)
        self._extend_kv([token])
        return self._settle(len(text))

    def _settle(self, start: int) -> tuple[str, int, int] | None:
        if self.token_ids[-1] in self.rules.stop_token_ids:
            return self._finished("stop", -1, 0)
        stops = self.rules.stop_patterns
        pattern, overshoot = first_match(self._text, start, (*stops, *self.rules.park_patterns))
        if pattern >= len(stops):
            self.state = "parked"
            return "parked", pattern - len(stops), overshoot
        if pattern >= 0:
            return self._finished("stop", pattern, overshoot)
        if self._exhausted or len(self.prompt) + len(self.token_ids) >= self.max_context:
            return self._finished("length", -1, 0)
        return None

    @property
    def _exhausted(self) -> bool:
        return sum(self.mask) >= self.max_tokens

    def _finished(self, reason: str, pattern: int, overshoot: int) -> tuple[str, int, int]:
        self.finish(reason)
        return "finished", pattern, overshoot

    def finish(self, reason: str) -> None:
        """Ends the row."""
        self.state, self.finish_reason = "done", reason

    def inject(self, ids: Sequence[int]) -> bool:
        """Appends tokens that were not sampled; False if that ends the row."""
        if self._exhausted or len(self.prompt) + len(self.token_ids) + len(ids) + 1 > (
            self.max_context
        ):
            self.finish("length")
            return False
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [0] * len(ids)
        self._extend_kv(ids)
        self.segment_start, self.state = len(self.token_ids), "runnable"
        return True
