"""`create_app`: the server as an ASGI application, for `florence2 serve` and for servers of one's own."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from florence2 import __version__
from florence2.errors import Florence2Error
from florence2.pipeline import Florence2
from florence2.serve.errors import RequestError, explain
from florence2.serve.http.routes import make_router
from florence2.serve.http.tools import Tools
from florence2.serve.incoming.body import ClientLeftError
from florence2.serve.incoming.fetch import Fetcher
from florence2.serve.incoming.guard import Guard, error_response
from florence2.serve.incoming.log import RequestLog, note
from florence2.serve.service import Loader, Service
from florence2.serve.settings import Settings

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    model: Florence2 | Loader | Sequence[tuple[str, Loader]],
    settings: Settings | None = None,
    *,
    fetcher: Fetcher | None = None,
    log: RequestLog | None = None,
) -> FastAPI:
    """Return a server as an ASGI application.

    Its state has the `service`, which is drained and stopped when the application is shut down.

    Args:
        model: A model; or a function that loads one when the application starts; or, for several devices, the name of
            each and a function that loads the model there, in a process of its own (the function must be picklable).
        settings: Limits, keys and names; None is the defaults, which let in whoever calls it by this machine's name.
        fetcher: What gets the images of URLs; None connects to the hosts that `settings` allow.
        log: Where a line about each request goes; None is stderr.

    Returns:
        The application.
    """
    settings = settings or Settings()
    service = Service(model if not isinstance(model, Florence2) else lambda: model, settings)
    tools = Tools.of(service, fetcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.drain()
        service.worker.stop()

    # FastAPI may send messages of exceptions to a collector; the log and /metrics are enough
    silent: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    app = FastAPI(
        title="Florence-2",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        telemetry=silent,
    )
    app.state.service = service
    app.include_router(make_router(tools))
    _handle_errors(app, service)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, log=log or RequestLog())
    if settings.origins:  # around the guard, because a browser asks for permission without a key
        allowed = {"allow_origins": settings.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allowed)  # type: ignore[arg-type]
    return app


def _handle_errors(app: FastAPI, service: Service) -> None:
    """Let every error be one of OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientLeftError):
            note(request, status=499)
            return Response(status_code=499)
        if isinstance(error, HTTPException):
            code = _CODES.get(error.status_code, "invalid_request")
            sentence = f"{request.method} {request.url.path[:100]} is not a route of this server; see /openapi.json."
            explained = RequestError(error.status_code, code, sentence, allow=(error.headers or {}).get("Allow"))
        else:
            explained = explain(error, str(request.scope.get("florence2.id", "")))
        service.metrics.failed(explained.code)
        return JSONResponse(**error_response(explained))

    for kind in (RequestError, Florence2Error, ClientLeftError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
