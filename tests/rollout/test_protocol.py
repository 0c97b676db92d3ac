"""How a consult is read and answered."""

from __future__ import annotations

from typing import Any

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import ConsultResult
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.rollout.protocol import Piece


def result(status: str, text: str = "") -> ConsultResult:
    return ConsultResult(status=status, text=text, usage=None, cost=0.0, latency=0.0, model=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("think <consult><q>1+1</q></consult>", ["1+1"]),
        ("<consult> <q> a </q>\n<q>b</q> </consult>", ["a", "b"]),
        ("<consult><q>x</q><q>y</q><q>z</q></consult>", ["x", "y", "z"]),
        ("<consult>old <consult><q>new</q></consult>", ["new"]),
        ("<consult><q>1</q></consult> tail", ["1"]),
        ("<consult></consult>", None),
        ("<consult><q></q></consult>", None),
        ("<consult><q>open</consult>", None),
        ("<consult>bare</consult>", None),
        ("<consult><q>1</q> bare</consult>", None),
        ("<consult><q>1</q><q>2</q><q>3</q><q>4</q></consult>", None),
        ("<consult><q>1<q>2</q></q></consult>", None),
        ("<q>1</q></consult>", None),
        ("no block at all", None),
    ],
)
def test_parse(text: str, queries: list[str] | None) -> None:
    assert ConsultProtocol().parse(text) == queries


def test_accepted_replies_are_numbered_and_kept_apart_from_tags() -> None:
    advised, pieces = ConsultProtocol().answer([result("ok", "24"), result("declined")])
    assert advised
    assert "".join(p.text for p in pieces) == (
        '<advice><a i="1">24</a><a i="2">unavailable</a></advice>'
    )
    assert [p for p in pieces if p.origin == "reply"] == [Piece("reply", "24")]


@pytest.mark.parametrize(
    "results", [None, [result("declined")], [result("down"), result("timeout")]]
)
def test_without_a_reply_there_is_one_notice(results: list[ConsultResult] | None) -> None:
    advised, pieces = ConsultProtocol().answer(results)
    assert not advised
    assert "".join(p.text for p in pieces) == "<advice>unavailable</advice>"


def test_notices_per_status() -> None:
    protocol = ConsultProtocol(notices={"default": "no", "timeout": "too late"})
    _, pieces = protocol.answer([result("timeout")])
    assert "".join(p.text for p in pieces) == "<advice>too late</advice>"


def test_bad_protocols_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_turns is 0"):
        ConsultProtocol(max_turns=0)
    with pytest.raises(ConfigError, match="empty"):
        ConsultProtocol(open_tag="")
    with pytest.raises(ConfigError, match="default"):
        ConsultProtocol(notices={})


@pytest.mark.parametrize(
    "bad",
    [
        {"open_tag": "<q>"},
        {"open_tag": "</consult>"},
        {"open_tag": "\u2039ask"},
        {"close_tag": ""},
        {"query_tags": ("<q>",)},
        {"query_tags": ("<q>", "<q>")},
        {"answer_tags": ("<a {x}>", "</a>")},
        {"answer_tags": ("<a {>", "</a>")},
        {"notices": {"default": "none</advice>"}},
        {"notices": {}},
        {"max_turns": "3"},
        {"max_queries": 0},
    ],
    ids=str,
)
def test_tags_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ConsultProtocol(**bad)
