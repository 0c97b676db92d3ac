"""The bytes that each token stands for, so that tags are matched across token boundaries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from eapo_fast.errors import ModelError

_TAG_LENGTH, _TAGS = 64, 256
"""Longest text whose tokens are remembered, and how many of them are."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """Invert GPT-2's byte-to-letter table: printable bytes stand for themselves, others shift."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (b for b in range(256) if b not in printable)
    table = {chr(b): b for b in printable}
    table.update({chr(256 + k): b for k, b in enumerate(shifted)})
    return table


def _kinds(node: Any) -> set[str]:
    """Return every `type` in a tokenizer's JSON section."""
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*(_kinds(v) for v in node.values()))
    if isinstance(node, list):
        return set().union(*(_kinds(v) for v in node))
    return set()


class Vocabulary:
    """Token bytes of a tokenizer, with safe ways to encode tags and replies.

    Args:
        tokenizer: a transformers tokenizer.
        size: rows of the LM head; ids past the tokenizer's are empty byte strings.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self._own: dict[str, tuple[int, ...]] = {}
        self.token_bytes: list[bytes] = self._read_bytes()
        added = tokenizer.added_tokens_decoder
        self.control_ids = frozenset(int(i) for i, token in added.items() if token.special)

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` as their bytes spell it (special tokens by name)."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def plain_text(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self.text(i for i in ids if i not in self.control_ids)

    def encode(self, text: str) -> list[int]:
        """Tokenise text of our own (a tag, a notice); no special tokens are put around it.

        Short texts are remembered: the same few tags are written around every reply.
        """
        known = self._own.get(text)
        if known is None:
            known = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) <= _TAG_LENGTH and len(self._own) < _TAGS:
                self._own[text] = known
        return list(known)

    def encode_foreign(self, text: str) -> list[int]:
        """Tokenise text of somebody else: whatever it says, no id is a control token."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [i for i in encoded["input_ids"] if i not in self.control_ids]

    def check_tag(self, tag: str) -> None:
        """Raise `ModelError` unless the tokenizer can write `tag`."""
        spelled = self.text(self.encode(tag)).strip()
        if spelled != tag.strip():
            raise ModelError(
                f"tag {tag!r}: the tokenizer writes it as {spelled!r}, so the policy can never "
                f"produce it. Choose a tag of its characters or add it with tokenizer.add_tokens"
            )

    def _read_bytes(self) -> list[bytes]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError("tokenizer: a fast tokenizer (tokenizer.json) is needed")
        kinds = _kinds(json.loads(backend.to_str()).get("decoder"))
        read = self._byte_level if "ByteLevel" in kinds else self._piece
        table = [b""] * self.size
        added = {int(i): t.content for i, t in self.tokenizer.added_tokens_decoder.items()}
        for token, index in self.tokenizer.get_vocab().items():
            if index < self.size:
                table[index] = added[index].encode() if index in added else read(token)
        return table

    @staticmethod
    def _byte_level(token: str) -> bytes:
        table = _byte_of_letter()
        if all(letter in table for letter in token):
            return bytes(table[letter] for letter in token)
        return token.encode()

    @staticmethod
    def _piece(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        if match:
            return bytes([int(match.group(1), 16)])
        return token.replace("\u2581", " ").encode()


def patterns(strings: Sequence[str]) -> list[bytes]:
    """Return the UTF-8 bytes of match strings."""
    return [s.encode() for s in strings]
