"""The tag matcher against a search in decoded bytes, over the tokens of real tokenizers."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from twin_matcher import completing_tokens, first_match

from eapo_fast import _core
from eapo_fast.engine.vocabulary import Vocabulary

TAGS = ("</consult>", "<q>", "</q>", "é>", "数\n", "🙂", "\n\nStop", "ß</q>")

ALPHABET = ("<consult>", "</consult>", "<q>", "</q>", "consult", "St", "op", "\n", " ", "  ")
ALPHABET += ("é", "數", "数", "🙂", "🙃", "ß", "ü>", "a", "48/2", "<", "/", ">", "q", "é>")

CORPUS = [
    "Natalia sold 48 clips in April. <consult><q>48/2</q></consult> The answer is 72.\n\nStop",
    "Straße 数 é é> 🙂 naïve </q></consult>\n\n<consult>",
]


def _byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def _sentence_piece() -> Any:
    """Characters beyond the 40 most frequent ones are written as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=130, limit_alphabet=40, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    core = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = trained.pre_tokenizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


@cache
def _tokenizer(kind: str) -> Any:
    """A BPE tokenizer in the manner of GPT-2 or of SentencePiece with byte fallback."""
    from transformers import PreTrainedTokenizerFast

    core = _byte_level() if kind == "byte-level" else _sentence_piece()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def _vocabulary(kind: str) -> list[bytes]:
    tokenizer = _tokenizer(kind)
    return Vocabulary(tokenizer, len(tokenizer)).token_bytes


def _split(rng: random.Random, text: bytes, token_bytes: list[bytes]) -> list[int]:
    """Tokens that spell `text`, drawn at random from all that would."""
    ids = []
    while text:
        fits = [i for i, piece in enumerate(token_bytes) if piece and text.startswith(piece)]
        ids.append(rng.choice(fits))
        text = text[len(token_bytes[ids[-1]]) :]
    return ids


def _first(matcher: Any, ids: list[int], token_bytes: list[bytes]) -> tuple[int, int] | None:
    """(pattern, bytes up to its end) of the first match in the stream of tokens."""
    state, read = matcher.root, 0
    for token in ids:
        state, pattern, overshoot = matcher.advance(state, token)
        read += len(token_bytes[token])
        if pattern >= 0:
            return pattern, read - overshoot
    return None


def _expected(text: bytes, patterns: list[bytes]) -> tuple[int, int] | None:
    ends = [(text.find(p) + len(p), -len(p), i) for i, p in enumerate(patterns) if p in text]
    return (min(ends)[2], min(ends)[0]) if ends else None


KINDS = ("byte-level", "sentence-piece")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_split_characters_and_spell_what_they_decode(kind):
    tokenizer, token_bytes = _tokenizer(kind), _vocabulary(kind)
    text = "數 🙃 ü and  </consult>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert b"".join(token_bytes[i] for i in ids) == text.encode()
    assert any(0x80 <= piece[0] < 0xC0 for piece in (token_bytes[i] for i in ids) if piece)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_matches_in_encoded_text_are_where_a_search_finds_them(kind, seed):
    rng, tokenizer, token_bytes = random.Random(seed), _tokenizer(kind), _vocabulary(kind)
    found = 0
    for _ in range(150):
        patterns = [tag.encode() for tag in rng.sample(TAGS, rng.randint(1, 4))]
        matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 12)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids).encode()
        assert decoded == text.encode()
        assert _first(matcher, ids, token_bytes) == _expected(decoded, patterns)
        found += _expected(decoded, patterns) is not None
    assert 30 < found < 150


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_matches_do_not_depend_on_how_bytes_are_split_into_tokens(kind, seed):
    rng, token_bytes = random.Random(10 + seed), _vocabulary(kind)
    patterns = [tag.encode() for tag in TAGS]
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    for _ in range(60):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 9))).encode()
        expected = _expected(text, patterns)
        for _ in range(3):
            ids = _split(rng, text, token_bytes)
            assert b"".join(token_bytes[i] for i in ids) == text
            assert _first(matcher, ids, token_bytes) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_match_in_random_tokens_is_reported(kind):
    """Bytes need not be text: the policy may write any tokens."""
    rng, token_bytes = random.Random(7), _vocabulary(kind)
    patterns = [tag.encode() for tag in TAGS] + [b"\x95\xb0", b"\xf0"]
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    tags = b" ".join(patterns)
    likely = [i for i, piece in enumerate(token_bytes) if piece and piece in tags]
    found = 0
    for _ in range(60):
        state, text = matcher.root, b""
        for token in rng.choices(likely, k=40):
            start, text = len(text), text + token_bytes[token]
            state, pattern, overshoot = matcher.advance(state, token)
            assert (pattern, overshoot) == first_match(text, start, patterns)
            found += pattern >= 0
    assert found > 50


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_would_complete_a_banned_string(kind):
    rng, token_bytes = random.Random(8), _vocabulary(kind)
    patterns = [b"<consult>", "数\n".encode(), "é>".encode(), b"sulks"]
    matcher = _core.TagMatcher(patterns, _core.Vocabulary(token_bytes))
    state, text = matcher.root, b""
    sizes = set()
    for token in _split(rng, b"".join(rng.choices(patterns, k=20)), token_bytes):
        expected = completing_tokens(text, patterns, token_bytes)
        assert matcher.completing_tokens(state) == expected
        sizes.add(len(expected))
        state, text = matcher.advance(state, token)[0], text + token_bytes[token]
    assert len(sizes) > 2
