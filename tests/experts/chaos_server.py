"""A loopback chat-completions server that misbehaves in seventeen ways, byte by byte.

    with ChaosServer("cut_body") as server:
        OpenAICompatible(server.url, "any")

The last line of a query is `hint <n>`. Odd n are answered well, with the text of that line; n
divisible by 4 meet the fault every time, the others meet it once and are answered well afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import socket
import struct
import threading
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

KINDS = (
    "hang",
    "reset",
    "slow_drip",
    "cut_body",
    "wrong_length",
    "rate_with_retry_after",
    "rate_without",
    "server_error",
    "unauthorized",
    "invalid_json",
    "wrong_schema",
    "empty",
    "huge",
    "not_utf8",
    "duplicate",
    "late_after_cancel",
    "clock_jump",
)
HUGE = 5 << 20


_steady = time.time
"""The server's own clock: a test may make the client's jump."""


def _date() -> str:
    return email.utils.formatdate(_steady(), usegmt=True)


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 11, "completion_tokens": 3}
    return json.dumps({"model": "chaos-1", "choices": [choice], "usage": usage}).encode()


def response(code: int, body: bytes, **headers: str) -> bytes:
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Date": _date(),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {code} Whatever", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class ChaosServer:
    """Serves on 127.0.0.1 while the context lasts; `kind` may be changed at any time.

    `kind="mixed"` draws the fault from the query's number. `late` is how long a late answer takes.
    """

    def __init__(self, kind: str = "mixed", *, late: float = 2.0) -> None:
        self.kind = kind
        self.late = late
        self.seen: Counter[str] = Counter()
        self.requests = 0
        self.late_answers = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._open())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait(5.0)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        assert not self._thread.is_alive()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if head.startswith("GET "):
            writer.write(response(200, b'{"data": []}'))
            await writer.drain()
            return True
        body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))))
        query = body["messages"][-1]["content"].rsplit("\n", 1)[-1]
        number = int("".join(c for c in query if c.isdigit()) or 1)
        self.requests += 1
        self.seen[query] += 1
        if number % 2 or (number % 4 == 2 and self.seen[query] > 1):
            writer.write(response(200, completion(query)))
            await writer.drain()
            return True
        kind = KINDS[number // 2 % len(KINDS)] if self.kind == "mixed" else self.kind
        return await self._misbehave(kind, query, fields.get("authorization", ""), writer)

    async def _misbehave(
        self, kind: str, query: str, key: str, writer: asyncio.StreamWriter
    ) -> bool:
        good = completion(query)
        echo = json.dumps({"error": f"you sent {key}"}).encode()
        if kind == "hang":
            await asyncio.sleep(3600)
        elif kind == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif kind == "slow_drip":
            for position in range(len(good)):
                whole = response(200, good) if position == 0 else b""
                writer.write(whole[: -len(good)] + good[position : position + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
        elif kind == "cut_body":
            writer.write(response(200, good)[:-20])
            await writer.drain()
        elif kind == "wrong_length":
            writer.write(response(200, good, Content_Length=str(len(good) - 9)))
            await writer.drain()
            return True
        elif kind == "late_after_cancel":
            await asyncio.sleep(self.late)
            self.late_answers += 1
            writer.write(response(200, good))
            await writer.drain()
        else:
            writer.write(_answers(kind, good, echo))
            await writer.drain()
            return True
        return False


def _answers(kind: str, good: bytes, echo: bytes) -> bytes:
    return {
        "rate_with_retry_after": lambda: response(429, echo, Retry_After="0.05"),
        "rate_without": lambda: response(429, echo),
        "server_error": lambda: response(503, echo),
        "unauthorized": lambda: response(401, echo),
        "invalid_json": lambda: response(200, b"{'single': quotes}"),
        "wrong_schema": lambda: response(200, b'{"choices": {"message": []}}'),
        "empty": lambda: response(200, b""),
        "huge": _huge,
        "not_utf8": lambda: response(200, b'{"choices": "\xff\xfe\xc3\x28"}'),
        "duplicate": lambda: response(200, good) * 2,
        "clock_jump": lambda: response(429, echo, Retry_After=_date(), Date=_date()),
    }[kind]()


@lru_cache(maxsize=1)
def _huge() -> bytes:
    return response(200, completion("x" * HUGE))


def sockets_of_this_process() -> int:
    """How many socket descriptors are open."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(entry.readlink()).startswith("socket:")
    return count


def settings() -> dict[str, Any]:
    """Settings of a `ConsultPolicy` under which a wave of 50 takes under two seconds."""
    return {"timeout": 1.5, "max_concurrency": 256, "breaker_failures": 1_000_000}
