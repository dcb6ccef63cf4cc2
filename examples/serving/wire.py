"""HTTP/1.1 on asyncio streams, as much of it as a JSON API with server-sent events needs: bodies by Content-Length, keep-alive,
answers with a length or in chunks, and to know at once when the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

HEAD_LIMIT, BODY_LIMIT = 2**15, 2**20  # bytes
IDLE_SECONDS = 60.0  # for a request to arrive whole, on a new connection or one that is kept


class HTTPError(Exception):
    """An answer that refuses."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, headers or {}, close


@dataclass(frozen=True)
class HTTPRequest:
    method: str
    path: str
    version: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def keep_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return wish == "keep-alive" if self.version == "HTTP/1.0" else wish != "close"


class Connection(asyncio.StreamReaderProtocol):
    """One client. `on_gone` is called when it closes its end, also while nothing is being read."""

    def __init__(self, serve: Callable[[Connection], Awaitable[None]]) -> None:
        self.reader = asyncio.StreamReader(limit=HEAD_LIMIT)
        self.gone = False
        self.on_gone: Callable[[], None] = lambda: None
        super().__init__(self.reader, self._connected)
        self._serve = serve

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
        self.writer = writer
        return self._serve(self)

    def eof_received(self) -> bool | None:
        self._has_gone()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_gone()
        super().connection_lost(exc)

    def _has_gone(self) -> None:
        if not self.gone:
            self.gone = True
            self.on_gone()

    # ---- in ----

    async def read_request(self) -> HTTPRequest | None:
        """The next request; None where the client has no more."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            raise HTTPError(431, f"the request's head is longer than {HEAD_LIMIT} bytes", close=True) from None
        try:
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            method, path, version = first.split(" ")
            headers = {name.strip().lower(): text.strip() for name, text in (line.split(":", 1) for line in lines)}
        except ValueError:
            raise HTTPError(400, "this is not HTTP/1.1", close=True) from None
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise HTTPError(505, f"{version} is not spoken here; HTTP/1.1 is", close=True)
        length = headers.get("content-length")
        if "transfer-encoding" in headers or (length is None and method == "POST"):
            raise HTTPError(411, "send the body with a Content-Length", close=True)
        if not (length or "0").isdecimal():
            raise HTTPError(400, f"Content-Length must be a number of bytes, got {length}", close=True)
        count = int(length or 0)
        if count > BODY_LIMIT:
            raise HTTPError(413, f"the body's {count} bytes are more than {BODY_LIMIT}; shorten the prompt", close=True)
        if headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            body = await self.reader.readexactly(count)
        except asyncio.IncompleteReadError:
            return None
        return HTTPRequest(method, path.partition("?")[0], version, headers, body)

    # ---- out ----

    def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None, close: bool = False) -> None:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self.writer.write(_head(status, headers, close) + data)

    def begin_events(self, request: HTTPRequest) -> Callable[[str], None]:
        """Start an answer of server-sent events. Returns what sends one; the empty string ends the answer."""
        chunked = request.version == "HTTP/1.1"
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        headers |= {"Transfer-Encoding": "chunked"} if chunked else {}
        self.writer.write(_head(200, headers, close=not (chunked and request.keep_alive)))

        def send(data: str) -> None:
            event = f"data: {data}\n\n".encode() if data else b""
            if chunked:
                self.writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            else:
                self.writer.write(event)

        return send


def _head(status: int, headers: dict[str, str], close: bool) -> bytes:
    headers |= {"Connection": "close"} if close else {}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {text}" for name, text in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
