"""The tag matcher against a search in the decoded bytes."""

from __future__ import annotations

import random

import pytest
from twin_matcher import completing_tokens, first_match

from eapo_fast import _core

ALPHABET = b"<q>/a"

PATTERN_SETS = {
    "one-tag": [b"</q>"],
    "prefix-of-another": [b"<q", b"<q>", b"<q>/"],
    "suffix-of-another": [b"q>", b"<q>", b"/<q>"],
    "inside-another": [b"<q>/", b"q>", b"a<q>a"],
    "overlapping": [b"aqa", b"qaq", b"aa"],
    "one-byte": [b">", b"<q>"],
    "repeating": [b"aaaa", b"aab"],
    "bytes-above-127": [b"\xff\xfe", b"\xfe\xff\xfe"],
    "none": [],
}


def _random_vocabulary(rng: random.Random, patterns: list[bytes]) -> list[bytes]:
    alphabet = ALPHABET + b"".join(patterns)
    pieces = [bytes(rng.choices(alphabet, k=rng.randint(0, 5))) for _ in range(53)]
    whole = [b"a" + pattern + b"/a" for pattern in patterns]
    return [*(bytes([byte]) for byte in sorted(set(alphabet))), *pieces, *whole]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("patterns", PATTERN_SETS.values(), ids=PATTERN_SETS)
def test_matches_equal_a_search_in_the_decoded_bytes(patterns, seed):
    rng = random.Random(seed)
    token_bytes = _random_vocabulary(rng, patterns)
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    for _ in range(20):
        state, text = matcher.root, b""
        for token in rng.choices(range(len(token_bytes)), k=31):
            start, text = len(text), text + token_bytes[token]
            state, pattern, overshoot = matcher.advance(state, token)
            assert (pattern, overshoot) == first_match(text, start, patterns)


@pytest.mark.parametrize("patterns", [p for p in PATTERN_SETS.values() if len(p) == 1])
def test_the_first_match_is_where_bytes_find_says(patterns):
    rng = random.Random(7)
    token_bytes = _random_vocabulary(rng, patterns)
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    found = 0
    for _ in range(200):
        state, text = matcher.root, b""
        for token in rng.choices(range(len(token_bytes)), k=13):
            text += token_bytes[token]
            state, pattern, overshoot = matcher.advance(state, token)
            if pattern >= 0:
                assert text.find(patterns[0]) + len(patterns[0]) == len(text) - overshoot
                found += 1
                break
        else:
            assert text.find(patterns[0]) < 0
    assert found > 20


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("patterns", PATTERN_SETS.values(), ids=PATTERN_SETS)
def test_completing_tokens_are_those_that_would_match(patterns, seed):
    rng = random.Random(100 + seed)
    token_bytes = _random_vocabulary(rng, patterns)
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    state, text = matcher.root, b""
    for token in rng.choices(range(len(token_bytes)), k=60):
        expected = completing_tokens(text, patterns, token_bytes)
        assert matcher.completing_tokens(state) == expected
        state, text = matcher.advance(state, token)[0], text + token_bytes[token]


def test_overshoot_counts_the_bytes_behind_the_first_match():
    matcher = _core.TagMatcher([b"</c>"], _core.Vocabulary([b"</", b"c>\n\n", b"a</c>b</c>"]))
    state, pattern, overshoot = matcher.advance(matcher.root, 0)
    assert (pattern, overshoot) == (-1, 0)
    assert matcher.advance(state, 1)[1:] == (0, 2)
    assert matcher.advance(matcher.root, 2)[1:] == (0, 5)


def test_tokens_without_bytes_change_nothing():
    matcher = _core.TagMatcher([b"ab"], _core.Vocabulary([b"a", b"", b"b"]))
    state = matcher.advance(matcher.root, 0)[0]
    for token in (1, 3, 10**6):
        assert matcher.advance(state, token) == (state, -1, 0)
    assert matcher.advance(state, 2)[1] == 0


@pytest.mark.parametrize(
    ("patterns", "message"), [([b"a", b""], "pattern 1 is empty"), ([b"a", b"a"], "repeats")]
)
def test_bad_patterns_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        _core.TagMatcher(patterns, _core.Vocabulary([b"a"]))


@pytest.mark.parametrize("state", [-1, 3])
def test_an_unknown_state_is_refused(state):
    with pytest.raises(ValueError, match=r"not in \[0, 3\)"):
        _core.TagMatcher([b"ab"], _core.Vocabulary([b"a"])).advance(state, 0)
