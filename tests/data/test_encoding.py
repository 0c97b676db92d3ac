from __future__ import annotations

from typing import Any

import pytest

from eapo_fast.data import drop_long_prompts, encode_prompts, load_dataset
from eapo_fast.errors import DataError

BOS, EOS = 1, 2


class Tokenizer:
    """Characters as code points, BOS in front and (as T5 does) EOS behind."""

    eos_token_id = EOS

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [BOS, *ids, EOS] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> dict[str, Any]:
        assert kwargs.pop("tokenize")
        assert kwargs.pop("return_dict")
        assert kwargs.pop("add_generation_prompt")
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        text += "".join(f"{name}={value}" for name, value in kwargs.items())
        return {"input_ids": [ord(c) for c in text]}


CHAT, PLAIN = Tokenizer("template"), Tokenizer(None)


def text(tokenizer: Tokenizer, row: dict[str, Any], **kwargs: Any) -> str:
    ids = encode_prompts(load_dataset([row]), tokenizer, **kwargs)[0]
    return "".join(chr(i) for i in ids)


MESSAGES = [{"role": "user", "content": "hi"}]


def test_messages_use_the_template() -> None:
    assert text(CHAT, {"prompt": MESSAGES}) == "<user>hi<assistant>"
    assert text(CHAT, {"prompt": MESSAGES}, system="S") == "<system>S<user>hi<assistant>"
    own = [{"role": "system", "content": "T"}, *MESSAGES]
    assert text(CHAT, {"prompt": own}, system="S") == "<system>T<user>hi<assistant>"
    kwargs = {"enable_thinking": False}
    assert text(CHAT, {"prompt": MESSAGES}, chat_template_kwargs=kwargs).endswith("thinking=False")


def test_problems_become_user_messages_or_a_line() -> None:
    for column in ("problem", "question"):
        assert text(CHAT, {column: "1+1?"}, system="S") == "<system>S<user>1+1?<assistant>"
        assert text(PLAIN, {column: "1+1?"}) == "\x011+1?\n"
        assert text(PLAIN, {column: "1+1?"}, system="S") == "\x01S\n\n1+1?\n"


def test_plain_prompts_stay_as_they_are_without_a_trailing_eos() -> None:
    assert text(CHAT, {"prompt": "2+2="}) == "\x012+2="
    assert text(PLAIN, {"prompt": "2+2="}) == "\x012+2="
    assert text(PLAIN, {"prompt": "2+2=\x02"}) == "\x012+2=\x02"


def test_messages_without_template_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 0 has messages.*no chat template"):
        encode_prompts(load_dataset([{"prompt": MESSAGES}]), PLAIN)


def test_long_prompts_are_refused_or_dropped() -> None:
    rows = load_dataset([{"prompt": "abc"}, {"prompt": "abcdef"}])
    encoded = encode_prompts(rows, PLAIN)
    with pytest.raises(DataError, match=r"longer than max_prompt_length 4 \(row 1: 7 tokens\)"):
        encode_prompts(rows, PLAIN, max_prompt_length=4)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer"):
        kept, ids = drop_long_prompts(rows, encoded, 4)
    assert (kept, ids) == (rows[:1], encoded[:1])
    assert drop_long_prompts(rows, encoded, None) == (rows, encoded)
    with pytest.raises(DataError, match="the shortest prompt has 4 tokens"):
        drop_long_prompts(rows, encoded, 3)
