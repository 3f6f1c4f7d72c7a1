"""The image of a request: bytes out of base64, a data URL, a URL that may be fetched, or the hash of an earlier one."""

import asyncio
import base64
import binascii
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from starlette.requests import Request

from florence2.errors import shown
from florence2.inputs.files import read_data_url
from florence2.serve.errors import RequestError
from florence2.serve.incoming.body import in_thread_if_long
from florence2.serve.incoming.fetch import Fetcher
from florence2.serve.service import Service
from florence2.serve.work.jobs import HeldImage

_FETCHES = 16  # at once
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class GivenImage:
    """How a request names its image; exactly one is given."""

    data: str | None = None
    url: str | None = None
    sha256: str | None = None
    file: bytes | None = None


@dataclass(frozen=True)
class OpenedImage:
    """An image for jobs, and the SHA-256 of its bytes."""

    held: HeldImage
    sha256: str


class ImageOpener:
    """Turns the images of requests into images for jobs."""

    def __init__(self, service: Service, fetcher: Fetcher):
        """Open images for `service`; `fetcher` gets those of URLs."""
        self._service, self._fetcher = service, fetcher
        # threads of their own: a slow host must not hold up what others read
        self._threads = ThreadPoolExecutor(_FETCHES, thread_name_prefix="florence2-fetch")

    async def open(self, request: Request, given: GivenImage) -> OpenedImage:
        """Return the image of a request. Raises RequestError, or ImageError for a broken data URL."""
        owner: str = request.scope.get("florence2.owner", "")
        if given.sha256 is not None:
            if not _HASH.fullmatch(given.sha256):
                raise RequestError(
                    400, "invalid_image", "sha256 must be 64 hexadecimal digits of an image's hash.", param="image"
                )
            sha256 = given.sha256.lower()
            return OpenedImage(self._service.hold(None, sha256, owner), sha256)
        data = given.file if given.file is not None else await self._bytes(given)
        sha256 = await in_thread_if_long(_hash, data)
        return OpenedImage(self._service.hold(data, sha256, owner), sha256)

    async def _bytes(self, given: GivenImage) -> bytes:
        if given.data is not None and given.data[:5].lower() != "data:":
            return await in_thread_if_long(_decode, given.data)
        url = given.url if given.data is None else given.data
        assert url is not None
        if url[:5].lower() == "data:":
            return (await in_thread_if_long(read_data_url, url)).getvalue()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._fetcher.fetch, url)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode(text: str) -> bytes:
    with suppress(binascii.Error, ValueError):
        return base64.b64decode(text, validate=True)
    try:  # it may have line ends, as those of `base64` without -w0
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            400, "invalid_image", f"The image's data is {shown(text, 30)}, which is not base64.", param="image"
        ) from None
