"""How a consult is written by the policy and answered by the engine (spec: EAPO part 12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from eapo_fast.errors import ConfigError
from eapo_fast.experts import ConsultResult
from eapo_fast.experts.checks import checked_count
from eapo_fast.experts.sanitize import OPENING

Origin = Literal["tag", "reply"]

_NOTICES = MappingProxyType({"default": "unavailable"})


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text to append: a tag or notice of ours, or a reply that must stay inert."""

    origin: Origin
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsultProtocol:
    """Tags, limits and notices of a consult.

    The policy writes `<consult><q>..</q></consult>` with 1 to `max_queries` queries. The engine
    appends `<advice><a i="1">..</a></advice>` and decoding goes on. If every query was refused or
    the block is malformed, `<advice>unavailable</advice>` is appended instead.
    """

    open_tag: str = "<consult>"
    """Opens a consult; banned when no consult is possible."""
    close_tag: str = "</consult>"
    """Closes it: the row is parked here."""
    query_tags: tuple[str, str] = ("<q>", "</q>")
    """Around each query."""
    advice_tags: tuple[str, str] = ("<advice>", "</advice>")
    """Around the engine's answer."""
    answer_tags: tuple[str, str] = ('<a i="{index}">', "</a>")
    """Around each reply; `{index}` counts from 1."""
    max_queries: int = 3
    """K: most queries in one block; a block with more is malformed."""
    max_turns: int = 10
    """Turns of a rollout: one more than the consults it may make."""
    notices: Mapping[str, str] = field(default_factory=lambda: _NOTICES)
    """Text per consult status (and `malformed_block`); `default` serves the others."""

    def __post_init__(self) -> None:
        checked_count("max_queries", self.max_queries)
        checked_count("max_turns", self.max_turns)
        for name in ("query_tags", "advice_tags", "answer_tags"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"{name} is {pair!r}; it must be a pair: (opening, closing).")
        try:
            tags = self.tags
        except (AttributeError, IndexError, KeyError, ValueError):
            raise ConfigError(
                f"answer_tags is {self.answer_tags!r}; the only field they may have is {{index}}."
            ) from None
        self._check_tags(tags)
        if "default" not in self.notices:
            raise ConfigError('notices: the key "default" is missing')
        for status, notice in self.notices.items():
            if any(tag in notice for tag in tags):
                raise ConfigError(f"notices[{status!r}] is {notice!r}; it must not hold a tag.")

    def _check_tags(self, tags: Sequence[str]) -> None:
        if not all(isinstance(tag, str) and tag for tag in tags):
            raise ConfigError("a consult tag is empty: every tag needs at least one character")
        taken = next((tag for tag in tags if OPENING in tag), None)
        if taken is not None:
            raise ConfigError(
                f"the tag {taken!r} holds {OPENING!r}, which stands for the start of a tag "
                "in a reply; choose another."
            )
        block = (self.open_tag, self.close_tag, *self.query_tags)
        if len(set(block)) < len(block):
            raise ConfigError(f"the tags of a consult {block!r} must be four different ones.")

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that may appear, answer tags spelled out."""
        answers = [self.answer_tags[0].format(index=i + 1) for i in range(self.max_queries)]
        return (
            self.open_tag,
            self.close_tag,
            *self.query_tags,
            *self.advice_tags,
            *answers,
            self.answer_tags[1],
        )

    def with_turns(self, max_turns: int) -> ConsultProtocol:
        """Return the same protocol with another turn limit."""
        return dataclasses.replace(self, max_turns=max_turns)

    def parse(self, turn_text: str) -> list[str] | None:
        """Return the queries of the block that closes `turn_text`, or None if it is malformed."""
        body, closed, _ = turn_text.rpartition(self.close_tag)
        _, opened, block = body.rpartition(self.open_tag)
        if not closed or not opened:
            return None
        queries = list(self._queries(block))
        if any(q is None for q in queries) or not 1 <= len(queries) <= self.max_queries:
            return None
        return [q for q in queries if q is not None]

    def answer(self, results: Sequence[ConsultResult] | None) -> tuple[bool, list[Piece]]:
        """Return whether the segment holds advice, and its pieces; None stands for malformed."""
        start, end = self.advice_tags
        if results is None or not any(r.accepted for r in results):
            status = "malformed_block" if results is None else results[0].status
            return False, [
                Piece("tag", start),
                Piece("tag", self.notice(status)),
                Piece("tag", end),
            ]
        pieces = [Piece("tag", start)]
        for index, result in enumerate(results):
            pieces.append(Piece("tag", self.answer_tags[0].format(index=index + 1)))
            pieces.append(self._reply(result))
            pieces.append(Piece("tag", self.answer_tags[1]))
        return True, [*pieces, Piece("tag", end)]

    def notice(self, status: str) -> str:
        """Return the fixed text that stands for a reply which did not come."""
        return self.notices.get(status, self.notices["default"])

    def instructions(self) -> str:
        """Return the paragraph that teaches a policy to consult; shown in training only."""
        query = "your question".join(self.query_tags)
        return (
            f"You may consult an expert while you think. Write {self.open_tag}{query}"
            f"{self.close_tag} with one to {self.max_queries} questions, each in its own "
            f"{self.query_tags[0]} block, and stop there. The reply follows in "
            f"{self.advice_tags[0]}; it may be missing, then go on alone. Check what it says and "
            f"put your final answer in \\boxed{{}}."
        )

    def _reply(self, result: ConsultResult) -> Piece:
        if result.accepted:
            return Piece("reply", result.text)
        return Piece("tag", self.notice(result.status))

    def _queries(self, block: str) -> Iterator[str | None]:
        """Yield each query of a block; None where something stands outside of the query tags."""
        start, end = self.query_tags
        rest = block.strip()
        while rest:
            query, closed, after = rest.removeprefix(start).partition(end)
            well_formed = rest.startswith(start) and closed and query.strip() and start not in query
            yield query.strip() if well_formed else None
            if not well_formed:
                return
            rest = after.strip()
