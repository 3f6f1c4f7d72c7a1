"""Read the body of a request: within its size and time, as JSON that cannot blow up, or as a form."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from florence2.errors import clip
from florence2.serve.errors import RequestError
from florence2.serve.settings import Settings

Data = TypeVar("Data", str, bytes)
Result = TypeVar("Result")
MAX_JSON_VALUES = 100_000
"""The most values, names and nested parts of a JSON body: a few bytes of JSON stand for many of memory."""
_GRACE, _RATE = 10.0, 64 << 10  # seconds for any body, and bytes a second beyond that
INLINE = 1 << 20
"""Bytes that are read in the event loop, which is sooner than to go to a thread; more would hold up other requests."""
_DISCARDED, _DISCARD_SECONDS = 4, 2.0  # of a body that is too long, so that its sender sees the answer
_MOST_FIELDS = 8


class BodyReader:
    """Reads bodies, and limits how many bytes of them exist at once."""

    def __init__(self, settings: Settings):
        """Read bodies within the limits of `settings`."""
        self._settings, self._bytes = settings, 0

    async def json(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a body. Raises RequestError for anything else."""
        if media_type(request) != "application/json":
            raise RequestError(
                415,
                "unsupported_media_type",
                f"The content type is {clip(request.headers.get('content-type', ''), 60)!r}; send application/json.",
            )
        body = await self.read(request)
        return await in_thread_if_long(parse_object, body)

    async def form(self, request: Request) -> tuple[dict[str, Any], bytes]:
        """Return the field `request` of a form, a JSON object, and the file `image`. Raises RequestError."""
        body = await self.read(request)
        parser = MultiPartParser(
            request.headers,
            _once(body),
            max_files=1,
            max_fields=_MOST_FIELDS,
            max_part_size=self._settings.max_body_bytes,
        )
        parser.spool_max_size = len(body) + 1  # images stay in memory
        try:
            fields = await parser.parse()
        except (MultiPartException, KeyError, ValueError) as error:
            raise RequestError(400, "invalid_form", f"The form cannot be read: {clip(error, 100)}.") from None
        image, given = fields.get("image"), fields.get("request")
        if not isinstance(image, UploadFile) or not isinstance(given, str):
            raise RequestError(
                400, "invalid_form", "The form needs a file named image, and a field named request with a JSON object."
            )
        return parse_object(given.encode()), await image.read()

    async def read(self, request: Request) -> bytes:
        """Return a whole body. Raises RequestError for one that is too long or too slow, or when too many are read."""
        started, size = time.monotonic(), 0
        chunks: list[bytes] = []
        stream = request.stream()
        try:
            while True:
                left = started + _GRACE + size / _RATE - time.monotonic()
                try:
                    chunk = await asyncio.wait_for(anext(stream), max(left, 0.001))
                except StopAsyncIteration:
                    return b"".join(chunks)
                except asyncio.TimeoutError:
                    raise RequestError(
                        408, "body_too_slow", f"The body came too slowly: {size:,} bytes in {_GRACE:.0f} s or more."
                    ) from None
                size += len(chunk)
                self._bytes += len(chunk)
                chunks.append(chunk)
                await self._check(size, stream)
        except ClientDisconnect:
            raise ClientLeftError from None
        finally:
            self._bytes -= size

    async def _check(self, size: int, stream: AsyncIterator[bytes]) -> None:
        most = self._settings.max_body_bytes
        if size > most:
            await _discard(stream, _DISCARDED * most)
            raise RequestError(
                413, "body_too_large", f"The body is longer than the {most:,} bytes allowed; send a smaller image."
            )
        if self._bytes > self._settings.queue_bytes:
            await _discard(stream, _DISCARDED * most)
            raise RequestError(
                429, "queue_full", "Too many bodies are being received at once; try again.", retry_after=1
            )


class ClientLeftError(Exception):
    """The client closed its connection before it had sent everything."""


async def _discard(stream: AsyncIterator[bytes], most: int) -> None:
    """Read a body to its end without keeping it, for a short time."""

    async def read() -> None:
        size = 0
        async for chunk in stream:
            size += len(chunk)
            if size > most:
                return

    try:
        await asyncio.wait_for(read(), _DISCARD_SECONDS)
    except (asyncio.TimeoutError, ClientDisconnect):
        return


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Return what a function returns that takes longer than other requests should wait."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def in_thread_if_long(function: Callable[[Data], Result], data: Data) -> Result:
    """Return what a function makes of data, in a thread where that takes longer than other requests should wait."""
    result: Result = function(data) if len(data) <= INLINE else await in_thread(function, data)
    return result


def media_type(request: Request) -> str:
    """Return the media type of a body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the object of a JSON body. Raises RequestError."""
    if sum(map(body.count, (b"[", b"{", b","))) > MAX_JSON_VALUES:
        raise RequestError(
            400, "invalid_json", f"The body has more than the {MAX_JSON_VALUES:,} values allowed in JSON."
        )
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(400, "invalid_json", "The JSON of the body is nested too deeply.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise RequestError(400, "invalid_json", f"The body is not JSON: {clip(error, 100)}.") from None
    if not isinstance(values, dict):
        raise RequestError(400, "invalid_json", f"The body is {type(values).__name__} in JSON; it must be an object.")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")
