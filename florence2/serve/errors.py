"""Errors of a request: an HTTP status, a code, and one sentence, in the form of OpenAI's errors."""

from typing import Any

from florence2.errors import Florence2Error, ImageError, OptionError, PromptError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "overloaded", 500: "server_error"}
_TYPES |= {503: "unavailable", 504: "timeout"}


class RequestError(Exception):
    """A request that gets no answer.

    Attributes:
        status: The HTTP status.
        code: What went wrong, for programs.
        param: The field of the body that is wrong, if it is one.
        retry_after: Seconds after which trying again may help.
        allow: The methods of a route, for one that was called by another.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> dict[str, Any]:
        """Return the JSON body that clients of OpenAI's API understand."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def __reduce__(self) -> tuple[Any, ...]:  # for the way between processes
        return _restore, (self.status, self.code, str(self), self.param, self.retry_after, self.allow)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the error."""
        given = {
            "retry-after": None if self.retry_after is None else str(self.retry_after),
            "allow": self.allow,
            "www-authenticate": "Bearer" if self.status == 401 else None,
        }
        return {name: value for name, value in given.items() if value is not None}


def _restore(status: int, code: str, message: str, *optional: Any) -> RequestError:
    return RequestError(status, code, message, **dict(zip(("param", "retry_after", "allow"), optional, strict=True)))


def explain(error: Exception, request_id: str = "") -> RequestError:
    """Return the error that a client sees: our own sentence, or nothing but the request's id for a bug."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ImageError):
        code = "image_too_large" if "pixels allowed" in str(error) else "invalid_image"
        return RequestError(400, code, str(error), param="image")
    if isinstance(error, PromptError):
        return RequestError(400, "invalid_prompt", str(error))
    if isinstance(error, OptionError):
        return RequestError(400, "invalid_value", str(error))
    if isinstance(error, Florence2Error):
        return RequestError(400, "invalid_request", str(error))
    return RequestError(
        500, "server_error", f"The server failed on this request; its log has the reason under the id {request_id}."
    )
