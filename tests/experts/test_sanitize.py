from __future__ import annotations

import random

import pytest

from eapo_fast.experts import clean_text, escape_tags

TAGS = ("<consult>", "</consult>", "<q>", "</q>", "<advice>", "</advice>", "[end]", "aa")


def test_control_and_hidden_characters_go_lines_and_tabs_stay() -> None:
    dirty = "a\x00b\x1b[31m\r\nc\td\u202ee\u200bf\u2028g\x85h\ufeff\U000e0041\ud800"
    assert clean_text(dirty) == ("ab[31m\nc\tdef\ng\nh\ufffd", False)


def test_length_is_capped_and_reported() -> None:
    assert clean_text("x" * 10, 10) == ("x" * 10, False)
    assert clean_text("x" * 11, 10) == ("x" * 10, True)
    text, cut = clean_text("\x00" * 1_000_000 + "tail", 10)
    assert (text, cut) == ("", True)


def test_removing_characters_cannot_join_a_tag_before_escaping() -> None:
    text, _ = clean_text("<con\u200bsult>")
    assert text == "<consult>"
    assert escape_tags(text, TAGS) == "\u2039consult>"


@pytest.mark.parametrize("text", ["<CONSULT>", "<<q>>", "<q</q>", "aaaa", "[END]"])
def test_no_tag_is_left(text: str) -> None:
    escaped = escape_tags(text, TAGS).lower()
    assert not any(tag in escaped for tag in TAGS)


def test_no_tag_is_left_in_random_text() -> None:
    rng = random.Random(1)
    pieces = [*TAGS, "<", ">", "a", "/", "consult", "\u2039", " ", "q>"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=12))
        escaped = escape_tags(text, TAGS)
        assert not any(tag in escaped.lower() for tag in TAGS)
        assert len(escaped) == len(text)


def test_other_text_is_untouched_and_bad_tags_are_refused() -> None:
    assert escape_tags("x < 3 and y > 2", TAGS) == "x < 3 and y > 2"
    assert escape_tags("anything", ()) == "anything"
    with pytest.raises(ValueError, match="empty"):
        escape_tags("x", [""])
