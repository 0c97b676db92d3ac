"""`OpenAICompatible`: any server that speaks chat-completions (vLLM, SGLang, hosted)."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import urllib.parse
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from eapo_fast.experts.base import ConsultRequest, ExpertReply, Usage
from eapo_fast.experts.calling import PROMPT_OVERHEAD, text_bytes
from eapo_fast.experts.chat import (
    PROMPT,
    SYSTEM,
    messages,
    parse_completion,
    parse_error,
    price,
    request_body,
)
from eapo_fast.experts.checks import (
    body_options,
    checked_count,
    checked_extra,
    checked_number,
    checked_prices,
    checked_prompt,
    checked_text,
    checked_url,
)
from eapo_fast.experts.secret import read_secret

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 3.0
MAX_BODY_BYTES = 4 << 20


class OpenAICompatible:
    """Asks `{base_url}/chat/completions`, one request per call.

    Each connection carries one request: bytes that a server sends beyond its answer (a duplicate, a
    body longer than declared) would otherwise be read as the answer to the next question.
    The scheduler owns retries and the deadline; here only connecting is bounded. The key is read
    once from a variable or a file, goes into the Authorization header and nowhere else.
    `prices` = (per million tokens read, per million written) makes money budgets possible.
    `extra_body` is added to each request; a value of None leaves a standard field out, for servers
    that want `max_completion_tokens` in the place of `max_tokens`.
    `prompt` and `system` are templates with {problem} and {query}. Thinking blocks are removed; a
    reply cut by the server at `max_reply_tokens` is kept and flagged `truncated`, or is
    `too_long` if nothing but thinking was written. ConfigError for an unusable setting.
    """

    max_batch_size = 1
    immediate = False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        api_key_file: str | PathLike[str] | None = None,
        prompt: str = PROMPT,
        system: str = SYSTEM,
        max_reply_tokens: int = 1024,
        temperature: float = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        import httpx  # noqa: F401  (here, so that it is not in the time of the first consult)

        self.base_url = checked_url(base_url)
        self.model = checked_text("model", model)
        self.prompt = checked_prompt(prompt)
        self.system = system
        self.max_reply_tokens = checked_count("max_reply_tokens", max_reply_tokens)
        self.temperature = checked_number("temperature", temperature)
        self.extra_body = checked_extra(extra_body or {})
        self.prices = checked_prices(prices)
        self._key = read_secret(api_key_env, api_key_file)
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._options, self._most_written = body_options(
            self.model, self.max_reply_tokens, self.temperature, self.extra_body
        )

    @property
    def priced(self) -> bool:
        """Whether money can be capped."""
        return self.prices is not None

    @property
    def identity(self) -> str:
        """Part of cache keys: everything that decides a reply, and no key."""
        return json.dumps([self.base_url, self.system, self.prompt, self._options])

    def worst_case(self, request: ConsultRequest) -> Usage:
        """Bound on one call: bytes read, the largest cap that is sent written."""
        written = self._most_written
        read = text_bytes(request) + len(f"{self.system}{self.prompt}".encode()) + PROMPT_OVERHEAD
        return Usage(read, written, price(read, written, self.prices))

    async def answer(self, requests: Sequence[ConsultRequest]) -> list[ExpertReply]:
        """One POST per request, at the same time if there are several."""
        return list(await asyncio.gather(*(self._ask(request) for request in requests)))

    async def _ask(self, request: ConsultRequest) -> ExpertReply:
        import httpx

        chat = messages(self.system, self.prompt, request)
        body = request_body(chat, self._options)
        try:
            return await self._post(json.dumps(body).encode())
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return ExpertReply.failed("down", _words(error), billed=False)
        except httpx.HTTPError as error:
            return ExpertReply.failed("down", _words(error))

    async def _post(self, body: bytes) -> ExpertReply:
        url = f"{self.base_url}/chat/completions"
        async with self._client().stream("POST", url, content=body) as response:
            payload = await _read(response)
            if payload is None:
                return ExpertReply.failed("too_long", f"the body passes {MAX_BODY_BYTES} bytes")
            if not response.is_success:
                return parse_error(response.status_code, response.headers, payload)
            if response.headers.get("content-encoding", "identity") != "identity":
                return ExpertReply.failed("malformed", "the body is compressed, unasked")
            return parse_completion(payload, self.prices)

    def _client(self) -> httpx.AsyncClient:
        import httpx

        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = httpx.AsyncClient(
                headers=self._headers(),
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=not _is_loopback(self.base_url),
            )
            self._clients[loop] = client
        return client

    def _headers(self) -> dict[str, str]:
        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key is None:
            return plain
        return {**plain, "Authorization": f"Bearer {self._key.reveal()}"}

    def probe(self) -> str | None:
        """Ask for the list of models within 3 s; any answer but a refused key is good."""
        import httpx

        try:
            with (
                httpx.Client(
                    headers=self._headers(),
                    timeout=PROBE_SECONDS,
                    trust_env=not _is_loopback(self.base_url),
                ) as client,
                client.stream("GET", f"{self.base_url}/models") as response,
            ):
                code = response.status_code
        except httpx.HTTPError as error:
            return f"the expert at {self.base_url} cannot be reached: {_words(error)}"
        if code in (401, 403):
            return f"the expert at {self.base_url} refuses the key (HTTP {code})"
        return None

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def __repr__(self) -> str:
        key = "a key" if self._key else "no key"
        return f"OpenAICompatible({self.base_url!r}, {self.model!r}, {key})"


async def _read(response: httpx.Response) -> bytes | None:
    """The raw body, or None once it passes the bound (at once if the server says so)."""
    declared = response.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        return None
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
