"""Server-sent events: the parts of an answer as they come, and a heartbeat while none does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from florence2.serve.http.waiting import unless_left
from florence2.serve.incoming.body import ClientLeftError
from florence2.serve.incoming.log import note
from florence2.serve.work.jobs import Answered

_HEARTBEAT = 5.0  # seconds


def event(values: dict[str, Any]) -> bytes:
    """Return JSON as one event."""
    return b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n"


class Growing:
    """The ids of a running answer, handed from the worker's thread to an event loop; only the newest count."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        """Hand ids to `loop`."""
        self._loop, self.more = loop, asyncio.Event()
        self.ids: list[int] = []

    def hear(self, ids: list[int]) -> None:
        """Take the ids so far, in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, ids)
        except RuntimeError:  # the loop has ended
            return

    def _take(self, ids: list[int]) -> None:
        self.ids = ids
        self.more.set()


async def stream_answer(
    future: "Future[Answered]", growing: Growing | None
) -> AsyncIterator[list[int] | Answered | None]:
    """Yield the ids so far whenever there are more, None every five seconds without, and at last the answer."""
    answer = asyncio.wrap_future(future)
    try:
        while not answer.done():
            more = asyncio.ensure_future(growing.more.wait()) if growing else None
            waiting: set[asyncio.Future[Any]] = {answer, more} if more else {answer}
            done, _ = await asyncio.wait(waiting, timeout=_HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
            if more is not None:
                more.cancel()
            if not done:
                yield None
            elif growing is not None and growing.more.is_set() and not answer.done():
                growing.more.clear()
                yield growing.ids
        yield answer.result()
    finally:
        answer.cancel()


class EventStream(Response):
    """A response of events. It begins with the first, so that an error before has a status of its own."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes | None,
        rest: AsyncIterator[bytes | None],
        failure: Callable[[Exception], dict[str, Any]],
        leave: Callable[[], object],
    ):
        """Send `first`, then `rest`; `failure` makes an event of an error, `leave` is called for a client that left."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._failure, self._leave = first, rest, failure, leave

    @classmethod
    async def start(
        cls,
        request: Request,
        parts: AsyncIterator[bytes | None],
        failure: Callable[[Exception], dict[str, Any]],
        leave: Callable[[], object],
    ) -> "EventStream":
        """Wait for the first event, or five seconds; return the response. Raises what the parts raise."""
        try:
            first = await unless_left(request, anext(parts))
        except BaseException:
            leave()
            raise
        return cls(first, parts, failure, leave)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, unless the client leaves."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await unless_left(Request(scope, receive), self._send_all(send))
        except ClientLeftError:
            note(Request(scope), status=499)
        finally:
            self._leave()

    async def _send_all(self, send: Send) -> None:
        await self._send(send, self._first)
        try:
            async for part in self._rest:
                await self._send(send, part)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  the status is sent already
            await self._send(send, event(self._failure(error)))
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _send(send: Send, part: bytes | None) -> None:
        await send(
            {"type": "http.response.body", "body": b": waiting\n\n" if part is None else part, "more_body": True}
        )
