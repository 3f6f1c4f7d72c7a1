"""The gate before every route: who may call, from which page, and one line in the log about each request."""

import hashlib
import hmac
import ipaddress
import json
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.serve.errors import RequestError, explain
from florence2.serve.incoming.log import RequestLog
from florence2.serve.metrics import Metrics
from florence2.serve.settings import Settings

_OPEN = ("/health",)  # to whoever watches whether the process lives
_SAME_SITE = ("same-origin", "none")


class Guard:
    """An ASGI application around the routes."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, log: RequestLog):
        """Guard `app`."""
        self._app, self._settings, self._metrics, self._log = app, settings, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["florence2.id"], started, status = f"req-{uuid.uuid4().hex[:24]}", time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["florence2.id"].encode())]
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            await self._app(scope, receive, watched)
        except RequestError as error:
            await self._refuse(error, watched)
        except Exception as error:
            if status:
                raise
            await self._refuse(explain(error, scope["florence2.id"]), watched)
            raise
        finally:
            self._log.write(scope, status, started)

    async def _refuse(self, error: RequestError, send: Send) -> None:
        self._metrics.failed(error.code)
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        headers.append((b"content-type", b"application/json"))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise RequestError for a request that may not pass."""
        host = headers.get("host", "")
        if self._settings.local and not is_loopback(host):
            raise RequestError(
                403, "host_not_allowed", f"The host {host[:60]!r} is not this machine; call the server as 127.0.0.1."
            )
        self._check_page(scope, headers, host)
        path = scope["path"]
        if self._settings.keys and path not in _OPEN and path != "/" and not path.startswith("/page/"):
            scope["florence2.owner"] = self._owner(headers)

    def _check_page(self, scope: Scope, headers: Headers, host: str) -> None:
        """Raise RequestError for a request that a web page of another host makes."""
        origin = headers.get("origin")
        if origin is None:
            foreign = scope["method"] == "POST" and headers.get("sec-fetch-site", "none") not in _SAME_SITE
        else:
            foreign = origin not in self._settings.origins and urlsplit(origin).netloc.lower() != host.lower()
        if foreign:
            raise RequestError(
                403, "origin_not_allowed", f"Pages of {(origin or 'another site')[:60]} may not call this server."
            )

    def _owner(self, headers: Headers) -> str:
        """Return who sends a key, as a hash of it. Raises RequestError without a right one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        # every key is compared, so that the time says nothing about them
        right = [hmac.compare_digest(given, known.encode()) for known in self._settings.keys]
        if scheme.lower() != "bearer" or not any(right):
            raise RequestError(
                401, "invalid_api_key", "The API key is missing or wrong; send it as Authorization: Bearer KEY."
            )
        return hashlib.sha256(given).hexdigest()


def is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if "@" in host or "/" in host:
        return False
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def error_response(error: RequestError) -> dict[str, Any]:
    """Return the arguments of a JSONResponse for an error."""
    return {"content": error.body(), "status_code": error.status, "headers": error.headers}
