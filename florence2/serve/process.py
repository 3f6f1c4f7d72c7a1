"""The process of a server: uvicorn with signals that drain, and connections that must send their head in time."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from florence2.serve.errors import RequestError
from florence2.serve.service import Service

CONCURRENCY = 1024
"""Connections at once, beyond which requests are answered with 503."""
_HEAD_SECONDS = 10.0
_HEAD_BYTES = 32 << 10
_KEEP_ALIVE = 20
_EXIT_STOPPED = 130
_LAST_LOOK = 0.2  # seconds without any job before the port is closed, for requests that were under way


class HeadTimeout(H11Protocol):
    """A connection that is closed unless the head of its request comes within ten seconds."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes; wait for a head unless one is complete."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer bytes that are not HTTP with an error in the form of all others."""
        body = json.dumps(RequestError(400, "invalid_http", "The request is not valid HTTP.").body())
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()


class DrainingServer(Server):
    """A server that ends in order: at the first signal it takes no more jobs and answers those it has."""

    def __init__(self, config: Config, service: Service):
        """Serve `service`."""
        super().__init__(config)
        self._service, self._signalled = service, False
        self.port = config.port

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM while the server runs, in place of whoever did before."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain at the first signal; end the process at the second."""
        if self._signalled:
            os._exit(_EXIT_STOPPED)
        self._signalled = True

    def _log_started_message(self, listeners: Any) -> None:
        self.port = listeners[0].getsockname()[1]
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        self._service.announce(f"http://{host}:{self.port}")

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: after a signal, once everything is answered or the time for it is over."""
        if self._signalled:
            await self._drain()
            return True
        if self._service.worker.failure is not None:
            return True
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        """Refuse new jobs, and wait for those that were accepted."""
        self._service.drain()
        end = time.monotonic() + self._service.settings.drain
        quiet = time.monotonic()
        while time.monotonic() < end and time.monotonic() < quiet + _LAST_LOOK:
            await asyncio.sleep(0.02)
            if not self._service.is_drained or self.server_state.tasks:
                quiet = time.monotonic()
        self._service.give_up()


def run(app: Any, service: Service, host: str, port: int) -> None:
    """Serve until a signal ends it. Raises what kept the model from being loaded."""
    config = Config(
        app,
        host=host,
        port=port,
        http=HeadTimeout,
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONCURRENCY,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    server = DrainingServer(config, service)
    server.run()
    if service.worker.failure is not None:
        raise service.worker.failure
