from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from pathlib import Path
from types import ModuleType

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import (
    ConsultPolicy,
    ConsultRequest,
    ConsultScheduler,
    Function,
    OpenAICompatible,
)
from eapo_fast.experts.secret import Secret, read_secret, redact

KEY = "sk+planted/KEY=0123456789"


def test_a_planted_key_is_found_nowhere(
    chat: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PLANTED", KEY)
    echo = f'{{"error": "bad key {KEY}, Authorization: Bearer {KEY}"}}'.encode()
    faults = [chat.status(401, payload=echo), chat.status(500, payload=echo), chat.RESET, chat.CUT]
    faults += [chat.body(echo), chat.status(429, payload=echo, retry_after="0")]
    policy = ConsultPolicy(
        retries=0, record=tmp_path / "record.jsonl", cache=tmp_path / "cache.sqlite"
    )
    seen: list[object] = []
    with caplog.at_level(logging.DEBUG), chat.ChatServer(faults=faults) as server:
        expert = OpenAICompatible(server.url, "m", api_key_env="PLANTED")
        with ConsultScheduler(expert, policy) as desk:
            for i in range(8):
                handle = desk.submit(ConsultRequest(f"q{i}"))
                seen += [handle.result(5.0), handle]
            seen += [desk.state_dict(), desk.drain_metrics(), desk.probe(), expert, vars(expert)]
            seen += [desk, vars(desk), expert.identity]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    seen += [caplog.text, *[path.read_bytes() for path in tmp_path.iterdir()]]
    text = "\n".join(map(repr, seen))
    assert [form for form in Secret(KEY).forms() if form in text] == []
    assert "[redacted]" in text


def test_a_secret_cannot_be_written() -> None:
    secret = Secret(KEY)
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy, json.dumps):
        with pytest.raises(TypeError) as caught:
            attempt(secret)
        assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in f"{secret} {secret!r}"


def test_a_malformed_key_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLANTED", f"{KEY}\nX-Injected: 1")
    with pytest.raises(ConfigError) as caught:
        read_secret("PLANTED", None)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    (tmp_path / "key").write_bytes(b"\xff" + KEY.encode())
    with pytest.raises(ConfigError) as caught:
        read_secret(None, tmp_path / "key")
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_credentials_of_others_are_redacted_by_their_looks() -> None:
    def fails(request: ConsultRequest) -> str:
        raise ValueError("api_key='abc123' Bearer tok.en http://u:p4ss@host/ sk-0123456789ab")

    with ConsultScheduler(Function(fails)) as desk:
        detail = desk.submit(ConsultRequest("q")).result(5.0).detail
    assert not any(word in detail for word in ("abc123", "tok.en", "p4ss", "sk-0123456789ab"))
    assert redact("48 tokens used; the token count is 3") == "48 tokens used; the token count is 3"
