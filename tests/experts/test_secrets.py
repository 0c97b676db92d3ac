from __future__ import annotations

import copy
import json
import logging
import pickle
import socket
import threading
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


ECHOES: dict[str, bytes] = {
    "status line": f"HTTP/1.1 401 bad key {KEY}\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "header": f"HTTP/1.1 401 X\r\nX-Key: {KEY}\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "broken status line": f"HTTP/1.1 {KEY}\r\n\r\n".encode(),
    "broken header": f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode(),
    "redirect": f"HTTP/1.1 307 X\r\nLocation: /?{KEY}\r\nContent-Length: 0\r\n\r\n".encode(),
    **{
        f"at byte {at}": (
            f"HTTP/1.1 500 X\r\nContent-Length: {at + len(KEY)}\r\n\r\n{'x' * at}{KEY}".encode()
        )
        for at in (160, 175, 185, 190, 480)
    },
}


@pytest.mark.parametrize("name", ECHOES)
def test_no_part_of_a_key_that_a_server_echoes_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in the quoted beginning of a body that is cut inside it, not in another library's log."""
    monkeypatch.setenv("PLANTED", KEY)
    with (
        caplog.at_level(logging.DEBUG),
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        thread = threading.Thread(target=_serve_once, args=(listener, ECHOES[name]), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        policy = ConsultPolicy(retries=0, record=tmp_path / "record.jsonl", timeout=10.0)
        expert = OpenAICompatible(url, "m", api_key_env="PLANTED")
        with ConsultScheduler(expert, policy) as desk:
            result = desk.submit(ConsultRequest("q")).result(20.0)
        thread.join(5.0)
    assert result.status in ("refused", "down")
    seen = "\n".join([caplog.text, repr(result), *[p.read_text() for p in tmp_path.iterdir()]])
    assert [KEY[i : i + 6] for i in range(len(KEY) - 5) if KEY[i : i + 6] in seen] == []


def _serve_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


def test_a_key_with_hidden_characters_inside_is_not_uncovered_by_cleaning(
    chat: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", KEY)
    files = {"record": tmp_path / "record.jsonl", "cache": tmp_path / "cache.sqlite"}
    text = f"your key is {KEY[:7]}\u200b{KEY[7:]}"
    with chat.ChatServer(answer=lambda body: text) as server:
        expert = OpenAICompatible(server.url, "m", api_key_env="PLANTED")
        with ConsultScheduler(expert, ConsultPolicy(**files)) as desk:
            assert desk.submit(ConsultRequest("q")).result(9.0).text == "your key is [redacted]"
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY[:7].encode() not in kept
    assert KEY[7:].encode() not in kept


def test_an_exception_in_a_log_record_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(KEY)
    try:
        raise ValueError(f"header {KEY}")
    except ValueError:
        logging.getLogger("asyncio").exception("task died of %s", KEY)
    assert "[redacted]" in caplog.text
    assert KEY not in caplog.text
    assert secret.reveal() == KEY


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
