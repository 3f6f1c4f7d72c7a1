"""Clients that are slow on purpose: heads and bodies that do not come."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request

from florence2.serve.errors import RequestError
from florence2.serve.incoming.body import BodyReader
from florence2.serve.process import HeadTimeout
from florence2.serve.settings import Settings


async def app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.5)  # an answer that takes longer than a head may
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def talk(*parts: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """Send parts to a server with slow clients' time set to 0.3 s; return what came back, and after how long."""
    config = uvicorn.Config(app, http=HeadTimeout, lifespan="off", log_config=None, ws="none")
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HeadTimeout(config, state, {}, loop), "127.0.0.1", 0)
    got = b""
    try:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        started = time.monotonic()
        with suppress(ConnectionError):  # closed with our bytes unread
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause)
            got = await asyncio.wait_for(reader.read(60), 5)
        took = time.monotonic() - started
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    finally:
        server.close()
        await asyncio.sleep(0.05)
    return got, took


@pytest.mark.parametrize("parts", [[], [b"GET / HT"], [b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 8]])
def test_a_head_that_does_not_come(parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.serve.process._HEAD_SECONDS", 0.3)
    got, took = asyncio.run(talk(*parts, pause=0.02))
    assert got == b"" and took < 2


def test_an_answer_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.serve.process._HEAD_SECONDS", 0.3)
    got, took = asyncio.run(talk(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert got.startswith(b"HTTP/1.1 200 OK") and took > 0.4


def request(*chunks: bytes, wait: float = 0.0) -> Request:
    coming = iter(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(wait)
        chunk = next(coming, None)
        if chunk is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": chunk, "more_body": True}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
    return Request(scope, receive)  # type: ignore[arg-type]


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.serve.incoming.body._GRACE", 0.2)
    reader = BodyReader(Settings())
    with pytest.raises(RequestError) as error:
        asyncio.run(reader.read(request(b"{", b"x" * 100)))
    assert (error.value.status, error.value.code) == (408, "body_too_slow") and reader._bytes == 0


def test_bodies_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.serve.incoming.body._DISCARD_SECONDS", 0.05)
    reader = BodyReader(Settings(queue_bytes=100))

    async def read_both() -> list[Any]:
        return list(
            await asyncio.gather(
                reader.read(request(b"x" * 60, wait=0.02)),
                reader.read(request(b"x" * 60, wait=0.03)),
                return_exceptions=True,
            )
        )

    monkeypatch.setattr("florence2.serve.incoming.body._GRACE", 0.3)
    codes = [error.code for error in asyncio.run(read_both())]
    assert codes == ["body_too_slow", "queue_full"] and reader._bytes == 0
