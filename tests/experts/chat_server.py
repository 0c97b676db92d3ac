"""A real chat-completions server on loopback, with faults on request.

    with ChatServer(answer=lambda body: "use 24", faults=[status(429, retry_after="0")]) as server:
        OpenAICompatible(server.url, "any")

Faults are used up in order of arrival, one a POST; after them every POST gets `answer`.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One way to misbehave."""

    kind: str
    code: int = 200
    payload: bytes = b""
    retry_after: str | None = None


def status(code: int, *, retry_after: str | None = None, payload: bytes = b"{}") -> Fault:
    return Fault("status", code, payload, retry_after)


def body(payload: bytes) -> Fault:
    return Fault("status", 200, payload)


HANG = Fault("hang")
RESET = Fault("reset")
CUT = Fault("cut")


def completion(text: str | None, *, finish: str = "stop", **message: Any) -> Body:
    return {
        "model": "loopback-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3},
    }


def reply(text: str | None, *, finish: str = "stop", **message: Any) -> Fault:
    return body(json.dumps(completion(text, finish=finish, **message)).encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._send(self.server.owner.models_status, b'{"data": []}')

    def do_POST(self) -> None:
        owner = self.server.owner
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request: Body = json.loads(sent)
        fault = owner.note(request, dict(self.headers))
        try:
            if fault is None:
                self._send(200, json.dumps(completion(owner.answer(request))).encode())
            else:
                self._misbehave(fault)
        except OSError:
            self.close_connection = True

    def _misbehave(self, fault: Fault) -> None:
        if fault.kind == "status":
            self._send(fault.code, fault.payload, fault.retry_after)
            return
        if fault.kind == "hang":
            self.server.owner.released.wait(30.0)
        if fault.kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        if fault.kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def _send(self, code: int, payload: bytes, retry_after: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    owner: ChatServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class ChatServer:
    """Serves on 127.0.0.1 at a free port while the context lasts."""

    def __init__(
        self,
        answer: Callable[[Body], str] = lambda request: "a hint",
        faults: Sequence[Fault] = (),
        models_status: int = 200,
    ) -> None:
        self.answer = answer
        self.models_status = models_status
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self._faults = deque(faults)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def note(self, request: Body, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            return self._faults.popleft() if self._faults else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
