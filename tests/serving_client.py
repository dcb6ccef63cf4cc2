"""A client of the serving example for its tests: an HTTP request on a socket of its own, as asyncio streams."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from serving.engine import Engine
from serving.server import Server


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self) -> list:
        """What the server-sent events say; the last must be [DONE]."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class RunningServer:
    """A server on a loop in a thread of its own, as `with RunningServer(engine) as server`."""

    def __init__(self, engine: Engine, **options) -> None:
        self.engine, self._options = engine, options
        self._ready = threading.Event()

    def __enter__(self) -> RunningServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(30)
        return self

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = Server(self.engine, "demo", **self._options)
        self.host, self.port = await self.server.start("127.0.0.1", 0)
        self._ready.set()
        await self._stop.wait()
        await self.server.stop()

    def __exit__(self, *exc) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    def send(self, data: bytes) -> Response:
        """What comes back for these bytes on a new connection."""

        async def exchange() -> Response:
            reader, writer = await self.open()
            writer.write(data)
            try:
                return await read_response(reader)
            finally:
                writer.close()

        return asyncio.run(exchange())

    def get(self, path: str, method: str = "GET") -> Response:
        return self.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def post(self, body: dict | bytes) -> Response:
        return self.send(post_bytes(body))


def post_bytes(body: dict | bytes, path: str = "/v1/completions", version: str = "1.1", headers: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers


async def read_chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"


async def read_response(reader: asyncio.StreamReader) -> Response:
    status, headers = await read_head(reader)
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        body = b"".join([chunk async for chunk in read_chunks(reader)])
    else:
        body = await reader.read()
    return Response(status, headers, body)
