"""Call an ASGI application without a server."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass
class Called:
    """What an application sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


def call(app: Any, method: str, path: str, body: Any = None, **headers: str) -> Called:
    """Send one request. What the application raises after its answer is what a server writes to its log."""
    sent: list[Any] = []
    coming = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        while not coming:
            await asyncio.sleep(60)
        return coming.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        with suppress(RuntimeError):
            await app(scope, receive, send)

    named = {"host": "127.0.0.1", "content-type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": pairs,
    }
    asyncio.run(run())
    given = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Called(sent[0]["status"], given, b"".join(each.get("body", b"") for each in sent))
