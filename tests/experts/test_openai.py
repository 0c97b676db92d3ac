from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from types import ModuleType

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import (
    Budget,
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    OpenAICompatible,
)
from eapo_fast.experts.chat import fill, retry_after, strip_thinking

POLICY = ConsultPolicy(timeout=5.0)


def consult(url: str, policy: ConsultPolicy = POLICY) -> tuple[ConsultResult, dict[str, float]]:
    with ConsultScheduler(OpenAICompatible(url, "m"), policy) as desk:
        result = desk.submit(ConsultRequest("what is 48/2?", "the {query} problem")).result(20.0)
        return result, desk.drain_metrics()


def test_a_reply_with_usage_model_and_thinking_removed(chat: ModuleType) -> None:
    with chat.ChatServer(answer=lambda body: "<think>48/2... 24</think>\nuse 24") as server:
        result, metrics = consult(server.url)
    assert (result.status, result.text, result.model) == ("ok", "use 24", "loopback-1")
    assert result.usage is not None
    assert result.usage.tokens == 14
    assert metrics["expert/tokens"] == 14
    [body] = server.requests
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 1024, 0.0)
    assert body["messages"][1]["content"].splitlines() == [
        "Problem:",
        "the {query} problem",
        "",
        "Question:",
        "what is 48/2?",
    ]


def test_rate_limits_are_obeyed(chat: ModuleType) -> None:
    faults = [chat.status(429, retry_after="0.3")]
    with chat.ChatServer(faults=faults) as server:
        start = time.monotonic()
        result, metrics = consult(server.url)
    assert result.status == "ok"
    assert time.monotonic() - start >= 0.3
    assert (metrics["expert/retries"], metrics["expert/sent"]) == (1, 2)


def test_server_errors_are_retried(chat: ModuleType) -> None:
    with chat.ChatServer(faults=[chat.status(500), chat.RESET]) as server:
        result, _ = consult(server.url)
    assert (result.status, len(server.requests)) == ("ok", 3)


FAULTS = {
    "401": (lambda chat: chat.status(401), "refused", 1),
    "404": (lambda chat: chat.status(404), "refused", 1),
    "redirect": (lambda chat: chat.status(302), "refused", 1),
    "413": (lambda chat: chat.status(413), "too_long", 1),
    "429 for a minute": (lambda chat: chat.status(429, retry_after="60"), "rate", 1),
    "not json": (lambda chat: chat.body(b"not json"), "malformed", 2),
    "wrong schema": (lambda chat: chat.body(b"[]"), "malformed", 2),
    "deep json": (lambda chat: chat.body(b"[" * 100_000), "malformed", 2),
    "not utf-8": (lambda chat: chat.body(b"\xff\xfe"), "malformed", 2),
    "huge": (lambda chat: chat.body(b"x" * (5 << 20)), "too_long", 1),
    "empty": (lambda chat: chat.reply(None), "malformed", 1),
    "refusal": (lambda chat: chat.reply(None, refusal="no"), "refused", 1),
    "only thinking": (lambda chat: chat.reply("<think>a", finish="length"), "too_long", 1),
    "cut body": (lambda chat: chat.CUT, "down", 2),
    "reset": (lambda chat: chat.RESET, "down", 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_as_statuses(chat: ModuleType, name: str) -> None:
    make, status, calls = FAULTS[name]
    with chat.ChatServer(faults=[make(chat)] * calls) as server:
        result, _ = consult(server.url, ConsultPolicy(timeout=5.0, retries=1))
    assert (result.status, result.text) == (status, "")
    assert len(server.requests) == calls


def test_a_reply_cut_at_its_cap_is_kept_and_flagged(chat: ModuleType) -> None:
    with chat.ChatServer(faults=[chat.reply("half a hi", finish="length")]) as server:
        result, _ = consult(server.url)
    assert (result.status, result.text, result.truncated) == ("ok", "half a hi", True)


def test_a_hanging_server_costs_no_more_than_the_deadline(chat: ModuleType) -> None:
    with chat.ChatServer(faults=[chat.HANG] * 40) as server:
        expert = OpenAICompatible(server.url, "m", prices=(1.0, 1.0))
        with ConsultScheduler(expert, ConsultPolicy(timeout=0.4), Budget(money=1.0)) as desk:
            start = time.monotonic()
            handles = [desk.submit(ConsultRequest(f"{i}")) for i in range(20)]
            results = [handle.result(5.0) for handle in handles]
            assert time.monotonic() - start < 0.4 + 0.25 + 0.2
            kept = desk.ledger.total()
    assert {result.status for result in results} <= {"timeout", "down"}
    assert kept.consults == len(server.requests)
    assert kept.nano > 0


def test_a_refused_connection_is_down_unbilled_and_named_by_the_probe() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with ConsultScheduler(OpenAICompatible(url, "m"), ConsultPolicy(retries=0)) as desk:
            assert desk.submit(ConsultRequest("q")).result(5.0).status == "down"
            assert desk.ledger.total().consults == 0
            problem = desk.probe()
    assert problem is not None
    assert url in problem
    assert "cannot be reached" in problem


def test_the_probe_is_content_with_any_answer_but_a_refused_key(chat: ModuleType) -> None:
    with chat.ChatServer() as server:
        assert OpenAICompatible(server.url, "m").probe() is None
    with chat.ChatServer(models_status=404) as server:
        assert OpenAICompatible(server.url, "m").probe() is None
    with chat.ChatServer(models_status=401) as server:
        assert "refuses the key" in str(OpenAICompatible(server.url, "m").probe())


def test_surplus_bytes_never_answer_the_next_question() -> None:
    """A server that sends each answer twice on one connection."""
    import json
    import threading

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with (
                contextlib.suppress(OSError),
                connection,
                connection.makefile("rb") as file,
            ):
                while True:
                    length = 0
                    while (line := file.readline().strip()) != b"":
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                    if not length:
                        break
                    body = json.loads(file.read(length))
                    text = body["messages"][-1]["content"].rsplit("\n", 1)[-1]
                    choice = {"finish_reason": "stop", "message": {"content": text}}
                    data = json.dumps({"choices": [choice]}).encode()
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                    connection.sendall((head + data) * 2)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with ConsultScheduler(OpenAICompatible(url, "m"), POLICY) as desk:
            for number in range(20):
                request = ConsultRequest(f"question {number}")
                assert desk.submit(request).result(5.0).text == f"question {number}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5.0)


def test_many_consults_at_once(chat: ModuleType) -> None:
    def answer(body: dict[str, list[dict[str, str]]]) -> str:
        return body["messages"][-1]["content"].rsplit("\n", 1)[-1]

    policy = ConsultPolicy(timeout=10.0, max_concurrency=16)
    with (
        chat.ChatServer(answer=answer) as server,
        ConsultScheduler(OpenAICompatible(server.url, "m"), policy) as desk,
    ):
        handles = [desk.submit(ConsultRequest(f"q{i}", "p", prompt=i)) for i in range(100)]
        texts = [handle.result(10.0).text for handle in handles]
    assert texts == [f"q{i}" for i in range(100)]


@pytest.mark.parametrize(
    "bad",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://user:pass@host/v1"},
        {"base_url": "http://host/v1?key=1"},
        {"base_url": "http://host:port/v1"},
        {"prompt": "no place for it"},
        {"max_reply_tokens": 0},
        {"prices": (-1.0, 0.0)},
        {"prices": (1.0, float("nan"))},
        {"prices": (float("inf"), 1.0)},
        {"prices": ("1", 1.0)},
        {"prices": 5},
        {"base_url": "http://ho st/v1"},
        {"base_url": "http://host\n/v1"},
        {"base_url": "http://xn--/v1"},
        {"base_url": "http://host/v1/chat/completions"},
        {"base_url": 7},
        {"model": ""},
        {"temperature": "hot"},
        {"max_reply_tokens": "7"},
        {"prompt": None},
        {"extra_body": {"x": object()}},
        {"extra_body": {"x": float("nan")}},
        {"extra_body": {"messages": []}},
        {"extra_body": {"stream": True}},
        {"extra_body": {"n": 4}},
        {"extra_body": {"max_tokens": "many"}},
        {"extra_body": {"max_tokens": None}},
        {"api_key_env": "EAPO_TEST_ABSENT"},
        {"api_key_file": "/nonexistent/key"},
        {"api_key_env": "A", "api_key_file": "B"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAICompatible(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **bad})
    assert "pass" not in str(caught.value).replace("password", "")


def test_extra_body_overrides_and_keys_come_from_files(chat: ModuleType, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("file-key-123\n")
    with chat.ChatServer() as server:
        expert = OpenAICompatible(
            server.url, "m", api_key_file=key, extra_body={"temperature": 0.5, "seed": 3}
        )
        with ConsultScheduler(expert) as desk:
            desk.submit(ConsultRequest("q")).result(5.0)
    assert server.headers[0]["Authorization"] == "Bearer file-key-123"
    assert (server.requests[0]["temperature"], server.requests[0]["seed"]) == (0.5, 3)


@pytest.mark.parametrize(
    "extra",
    [
        {"max_tokens": 9000},
        {"max_completion_tokens": 9000},
        {"max_tokens": None, "max_completion_tokens": 9000},
    ],
    ids=str,
)
def test_the_budget_holds_whichever_field_bounds_the_reply(
    chat: ModuleType, extra: dict[str, int | None]
) -> None:
    """A server that writes as much as it was allowed to, and a cap that two such replies pass."""

    def answer(body: dict[str, int]) -> dict[str, object]:
        written = max(body.get("max_tokens", 0), body.get("max_completion_tokens", 0))
        full = chat.completion("a hint")
        full["usage"] = {"prompt_tokens": 20, "completion_tokens": written}
        return full

    import json

    bodies = [chat.body(json.dumps(answer({"max_tokens": 9000})).encode()) for _ in range(6)]
    with chat.ChatServer(faults=bodies) as server:
        expert = OpenAICompatible(server.url, "m", prices=(0.0, 1.0), extra_body=extra)
        with ConsultScheduler(expert, POLICY, Budget(money=0.0179)) as desk:
            handles = [desk.submit(ConsultRequest(f"q{i}")) for i in range(6)]
            statuses = [handle.result(9.0).status for handle in handles]
            spent, overruns = desk.ledger.total().nano / 1e9, desk.ledger.overruns
    assert statuses.count("ok") == 1
    assert (spent, overruns) == (0.009, 0)
    sent = server.requests[0]
    assert [sent.get(n) for n in ("max_tokens", "max_completion_tokens")] == [
        extra.get("max_tokens", 1024),
        extra.get("max_completion_tokens"),
    ]
    assert all(value is not None for value in sent.values())


def test_thinking_is_removed_in_every_shape() -> None:
    shapes = {
        "plain": "plain",
        "<think>a</think>b<THINK>c</THINK>d": "bd",
        "opened in the prompt</think> answer": "answer",
        "answer <think>cut": "answer",
        "<thinking>\nx\n</thinking>\n y": "y",
    }
    assert {text: strip_thinking(text) for text in shapes} == shapes


def test_a_reply_of_nothing_but_thinking_tags_costs_no_time() -> None:
    start = time.process_time()
    assert strip_thinking("<think>" * 200_000) == ""
    assert strip_thinking("<think>a</think>" * 100_000 + "b") == "b"
    assert strip_thinking("a</think>" * 100_000 + "b") == "b"
    assert time.process_time() - start < 2.0


def test_template_fields_cannot_name_each_other() -> None:
    request = ConsultRequest("{problem}{query}", "{query}")
    assert fill("{problem}|{query}|{other}", request) == "{query}|{problem}{query}|{other}"


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after("1.5") == 1.5
    assert retry_after("-3") == 0.0
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=20.0) == 40.0
    assert [retry_after(value) for value in (None, "soon", "nan", "inf", "")] == [None] * 5
