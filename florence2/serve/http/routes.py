"""The routes of a server."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from florence2.serve.errors import RequestError
from florence2.serve.http.chat import answer_chat
from florence2.serve.http.native import answer_tasks
from florence2.serve.http.openapi import ANSWERING, ANY, CHAT, MODEL_NAME, TASKS, TEXT, errors
from florence2.serve.http.tools import Tools
from florence2.serve.incoming.body import in_thread

Answering: TypeAlias = Callable[[Request], Awaitable[Response]]
PAGE = Path(__file__).parents[1] / "page"
_CSP = "default-src 'self'; img-src 'self' blob: data:"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_TYPES |= {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".ico": "image/x-icon"}


def make_router(tools: Tools) -> APIRouter:
    """Return all routes of a server."""
    router, routes = APIRouter(), Routes(tools)

    def add(path: str, answer: Answering, method: str = "GET", **about: Any) -> None:
        about.setdefault("responses", ANY)
        kind = PlainTextResponse if about["responses"] is TEXT else JSONResponse
        router.add_api_route(path, _named(answer, path, method), methods=[method], response_class=kind, **about)

    add("/v1/chat/completions", routes.chat, "POST", responses=ANSWERING, openapi_extra=CHAT)
    add("/v1/florence2", routes.tasks_on_image, "POST", responses=ANSWERING, openapi_extra=TASKS)
    add("/v1/models", routes.models)
    add("/v1/models/{name:path}", routes.model, responses=ANY | errors(404), openapi_extra=MODEL_NAME)
    add("/v1/tasks", routes.tasks, responses=ANY | errors(503))
    add("/health", routes.health)
    add("/ready", routes.ready, responses=ANY | errors(503))
    add("/metrics", routes.metrics, responses=TEXT)
    add("/version", routes.version, responses=ANY | errors(503))
    add("/", routes.page, include_in_schema=False)
    add("/page/{name}", routes.page, include_in_schema=False)
    return router


class Routes:
    """What each route answers."""

    def __init__(self, tools: Tools):
        """Answer with the service of `tools`."""
        self._tools, self._service = tools, tools.service

    async def chat(self, request: Request) -> Response:
        """Answer one question in OpenAI's form."""
        return await answer_chat(request, self._tools)

    async def tasks_on_image(self, request: Request) -> Response:
        """Answer several tasks on one image."""
        return await answer_tasks(request, self._tools)

    async def models(self, _: Request) -> Response:
        """List the names of the model."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._tools.settings.names]})

    async def model(self, request: Request) -> Response:
        """Describe one of them."""
        name = request.path_params["name"]
        self._tools.check_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._service.created, "owned_by": "florence2"}

    async def tasks(self, _: Request) -> Response:
        """List the tasks, those of the model's own included."""
        tasks = [
            {
                "task": task.token,
                "alias": task.alias,
                "sentence": task.sentence,
                "takes": task.takes,
                "kind": task.answer,
            }
            for task in self._service.model.processor.tasks.values()
        ]
        return JSONResponse({"tasks": tasks})

    async def health(self, _: Request) -> Response:
        """Say that the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Say that requests are answered; an error while they are not."""
        self._service.check_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """Return the metrics for Prometheus."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _: Request) -> Response:
        """Return versions, and the hash of the weights."""
        self._service.check_ready()
        facts = await in_thread(lambda: self._service.facts)
        return JSONResponse({**facts, "model": self._tools.settings.names[0]})

    async def page(self, request: Request) -> Response:
        """Return a file of the page. Raises RequestError for any other name."""
        name = request.path_params.get("name", "index.html")
        path = PAGE / name
        if Path(name).name != name or path.suffix not in _TYPES or not path.is_file():
            raise RequestError(404, "not_found", "No such file belongs to the page.")
        headers = {"content-security-policy": _CSP, "x-content-type-options": "nosniff"}
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=headers)


def _named(answer: Answering, path: str, method: str) -> Answering:
    """Return a route that leaves its name for the log; a path that a client chose stays out of it."""

    async def named(request: Request) -> Response:
        request.scope["florence2.route"] = path
        return await answer(request)

    named.__name__ = f"{method.lower()}_{path.strip('/').replace('/', '_') or 'page'}"
    return named
