"""Wait for answers while the client may leave: who leaves cancels what was asked."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.requests import Request

from florence2.serve.errors import RequestError
from florence2.serve.incoming.body import ClientLeftError
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import Answered

T = TypeVar("T")
_HEADER = "x-request-timeout-ms"


def deadline_of(request: Request, settings: Settings) -> float:
    """Return when a request is given up, in seconds of `time.monotonic`. Raises RequestError for a wrong header."""
    given = request.headers.get(_HEADER)
    if given is None:
        return time.monotonic() + settings.deadline
    if not (given.isascii() and given.isdigit() and 0 < len(given) <= 9 and int(given) > 0):
        raise RequestError(
            400, "invalid_value", f"{_HEADER} is {given[:20]!r}; it must be a number of milliseconds.", param=_HEADER
        )
    return time.monotonic() + min(settings.deadline, int(given) / 1000)


async def unless_left(request: Request, waiting: Awaitable[T]) -> T:
    """Return the awaited value. Raises ClientLeftError, after cancelling it, when the client has closed."""
    answer: asyncio.Future[T] = asyncio.ensure_future(waiting)
    left = asyncio.ensure_future(_left(request))
    try:
        both: set[asyncio.Future[Any]] = {answer, left}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientLeftError
        return answer.result()
    finally:
        left.cancel()
        answer.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def outcomes(futures: Sequence["Future[Answered]"]) -> list[Answered | BaseException]:
    """Return all answers, or the errors in their places; cancels them when it is cancelled itself."""
    return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
