"""From results to token ids: our tags as they are, replies so that they cannot act as ours."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from eapo_fast.engine import Vocabulary
from eapo_fast.experts import ConsultResult, escape_tags
from eapo_fast.rollout.protocol import ConsultProtocol, Piece
from eapo_fast.rollout.types import SegmentKind


@dataclass(frozen=True, slots=True)
class Answer:
    """What joins a row after a consult block."""

    kind: SegmentKind
    """expert if any query was answered, else notice."""
    token_ids: list[int]
    """The whole segment."""
    spans: list[tuple[int, int]]
    """[start, stop) of each query's own tokens inside the segment: a share of it each, in order."""
    results: list[ConsultResult]
    """The results, with what was done to their text here added to their traces."""


def compose(
    vocabulary: Vocabulary,
    protocol: ConsultProtocol,
    results: Sequence[ConsultResult] | None,
    max_reply_tokens: int,
) -> Answer:
    """Write the segment that answers a block; None stands for a malformed one.

    A query's span is its tags and what stands between them; where a whole block was refused, the
    one notice belongs to the first query and the others have an empty span.
    """
    advised, pieces = protocol.answer(results)
    ids: list[int] = []
    borders = [0]
    done = list(results or ())
    query = 0
    for index, piece in enumerate(pieces):
        if piece.origin == "reply":
            written, done[query] = _reply(
                vocabulary, protocol, piece, done[query], max_reply_tokens
            )
            ids += written
        else:
            ids += vocabulary.encode(piece.text)
        if advised and _closes_query(pieces, index):
            query += 1
            borders.append(len(ids))
    spans = _spans(borders if advised else [0, len(ids)], len(done), vocabulary, protocol, advised)
    return Answer("expert" if advised else "notice", ids, spans, done)


def _closes_query(pieces: Sequence[Piece], index: int) -> bool:
    """Pieces of an answered block are: start, then (open, text, close) for each query, end."""
    return 0 < index < len(pieces) - 1 and index % 3 == 0


def _spans(
    borders: list[int], count: int, vocabulary: Vocabulary, protocol: ConsultProtocol, advised: bool
) -> list[tuple[int, int]]:
    if not advised:
        return [(0, borders[-1])] + [(borders[-1], borders[-1])] * (count - 1) if count else []
    first = len(vocabulary.encode(protocol.advice_tags[0]))
    return [(max(first, start), stop) for start, stop in pairwise(borders)]


def _reply(
    vocabulary: Vocabulary,
    protocol: ConsultProtocol,
    piece: Piece,
    result: ConsultResult,
    limit: int,
) -> tuple[list[int], ConsultResult]:
    ids = encode_reply(vocabulary, piece.text, protocol.tags)
    escaped = escape_tags(piece.text, protocol.tags) != piece.text
    cut = len(ids) > limit
    if not (escaped or cut):
        return ids, result
    steps = (*result.trace.transforms, *["escaped"] * escaped, *["cut"] * cut)
    trace = replace(result.trace, transforms=tuple(dict.fromkeys(steps)))
    return ids[:limit], replace(result, truncated=result.truncated or cut, trace=trace)


def encode_reply(vocabulary: Vocabulary, text: str, tags: Sequence[str]) -> list[int]:
    """Tokenise a reply so that neither its ids nor their text hold a control token or a tag."""
    ids = vocabulary.encode_foreign(escape_tags(text, tags))
    if any(tag in vocabulary.text(ids) for tag in tags):  # the tokenizer itself makes one
        plain = unicodedata.normalize("NFKC", text).replace("<", "(").replace(">", ")")
        ids = vocabulary.encode_foreign(escape_tags(plain, tags))
    if any(tag in vocabulary.text(ids) for tag in tags):
        return []
    return ids
