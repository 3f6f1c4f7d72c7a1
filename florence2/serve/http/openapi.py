"""What `/openapi.json` says about the routes: bodies, and the errors that each may answer with."""

from collections.abc import Mapping
from typing import Any

from florence2.serve.http.schemas import Body, ChatBody, TasksBody

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_SENTENCES = {
    400: "the request is wrong",
    401: "the API key is missing or wrong",
    403: "the host or the page may not call this server",
    404: "the model or the image is not known here",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "the body is of another type",
    429: "the queue is full",
    500: "the server failed",
    503: "the model is being loaded, or the server is stopping",
    504: "the deadline is over",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of errors for OpenAPI."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _SENTENCES[status], "content": content} for status in statuses}


ANY = errors(401, 403, 500)
TEXT = ANY | {
    200: {"description": "Prometheus's text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
ANSWERING = errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def _body(*contents: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name, schema in contents}}}


def _schema(model: type[Body]) -> Any:
    """Return the JSON schema of a body, without references, as it stands inside of another document."""
    return _inlined(model.model_json_schema(), {})


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        definitions = value.get("$defs", definitions)
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(each, definitions) for name, each in value.items() if name != "$defs"}
    return [_inlined(each, definitions) for each in value] if isinstance(value, list) else value


_FORM = {
    "type": "object",
    "required": ["image", "request"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "request": {"type": "string", "description": "the JSON body, without image"},
    },
}


CHAT = _body(("application/json", _schema(ChatBody)))
TASKS = _body(("application/json", _schema(TasksBody)), ("multipart/form-data", _FORM))
MODEL_NAME = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
