"""From rows to prompt token ids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from eapo_fast.data.rows import PROBLEM_COLUMNS
from eapo_fast.errors import DataError

Messages = list[dict[str, Any]]


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int | None = None,
) -> list[list[int]]:
    """Turn the `prompt` of each row into token ids.

    - Messages go through the tokenizer's chat template, with the generation prompt.
    - A row with a `problem` or `question` becomes a user message if the tokenizer has a chat
      template, else the plain text of the problem and a line feed.
    - Any other text is encoded as it stands, with the special tokens that the tokenizer puts in
      front by itself; an EOS that it would append is removed, since the policy goes on from here.

    Args:
        rows: Rows of `load_dataset`.
        tokenizer: A transformers tokenizer.
        system: System text before problems and messages (messages with a system message of their
            own keep it); before plain text it is a paragraph of its own.
        chat_template_kwargs: Passed on to the chat template.
        max_prompt_length: Most tokens of a prompt; use `drop_long_prompts` to leave out the rest.

    Returns:
        One list of token ids per row, in order.

    Raises:
        DataError: A row has messages but the tokenizer no chat template, or a prompt is empty or
            longer than `max_prompt_length`.
    """
    encoded = [
        _encode(row, index, tokenizer, system, dict(chat_template_kwargs or {}))
        for index, row in enumerate(rows)
    ]
    _check_lengths(encoded, max_prompt_length)
    return encoded


def drop_long_prompts(
    rows: Sequence[dict[str, Any]], encoded: Sequence[list[int]], max_prompt_length: int | None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Leave out rows whose prompt has more than `max_prompt_length` tokens, with a warning.

    Raises:
        DataError: No row is left.
    """
    limit = max_prompt_length
    kept = [i for i, ids in enumerate(encoded) if limit is None or len(ids) <= limit]
    if not kept:
        shortest = min(len(ids) for ids in encoded)
        raise DataError(f"max_prompt_length {limit}: the shortest prompt has {shortest} tokens")
    if len(kept) < len(encoded):
        warnings.warn(
            f"{len(encoded) - len(kept)} of {len(encoded)} prompts are longer than "
            f"max_prompt_length {limit} and are left out",
            stacklevel=2,
        )
    return [rows[i] for i in kept], [encoded[i] for i in kept]


def _encode(
    row: Mapping[str, Any], index: int, tokenizer: Any, system: str | None, kwargs: dict[str, Any]
) -> list[int]:
    prompt = row["prompt"]
    has_template = bool(getattr(tokenizer, "chat_template", None))
    is_problem = any(row.get(column) == prompt for column in PROBLEM_COLUMNS)
    if not isinstance(prompt, str):
        if not has_template:
            raise DataError(
                f"row {index} has messages, but the tokenizer has no chat template; give prompts "
                "as text or set tokenizer.chat_template"
            )
        return _render([dict(message) for message in prompt], tokenizer, system, kwargs)
    if is_problem and has_template:
        return _render([{"role": "user", "content": prompt}], tokenizer, system, kwargs)
    text = f"{prompt}\n" if is_problem else prompt
    return _plain(f"{system}\n\n{text}" if system else text, tokenizer)


def _render(
    messages: Messages, tokenizer: Any, system: str | None, kwargs: dict[str, Any]
) -> list[int]:
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
    )
    return [int(token) for token in rendered["input_ids"]]


def _plain(text: str, tokenizer: Any) -> list[int]:
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    eos = getattr(tokenizer, "eos_token_id", None)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    appended = ids[-1:] == [eos] and ids[: len(ids) - 1][-len(bare) :] == list(bare)
    return ids[:-1] if appended else ids


def _check_lengths(encoded: Sequence[list[int]], max_prompt_length: int | None) -> None:
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise DataError(f"the prompts of rows {empty[:5]} have no tokens")
    if max_prompt_length is None:
        return
    long = [(index, len(ids)) for index, ids in enumerate(encoded) if len(ids) > max_prompt_length]
    if long:
        index, length = long[0]
        raise DataError(
            f"{len(long)} prompts are longer than max_prompt_length {max_prompt_length} (row "
            f"{index}: {length} tokens); raise it, or leave them out with drop_long_prompts"
        )
