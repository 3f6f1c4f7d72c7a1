"""The bodies of requests as pydantic models, which also make up the schemas of `/openapi.json`."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from florence2.errors import shown
from florence2.serve.errors import RequestError

MAX_TASKS = 32
"""The most tasks of one request."""
MAX_MESSAGES = 256
"""The most messages of a chat."""
LONGEST_TEXT = 20_000  # characters of a prompt; the longest that a model reads has about 1,000 tokens
_MOST_BEAMS = 64
_MOST_IDS = 1 << 20
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Beams = Annotated[int, Field(ge=1, le=_MOST_BEAMS)]
Ids = Annotated[int, Field(ge=1, le=_MOST_IDS)]
Box = Annotated[list[float], Field(min_length=4, max_length=4)]
Own = TypeVar("Own", bound="Body")


class Body(BaseModel):
    """MessagePart of a body. Unknown fields are ignored, as OpenAI's API grows; known ones must have the right type."""

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def read(cls: type[Own], values: object) -> Own:
        """Return the checked values. Raises RequestError with the first problem as a sentence."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
        problem = min(problems, key=lambda each: len(each["loc"]))
        raise RequestError(
            400, "invalid_value", _sentence(problem["loc"], problem), param=_path(problem["loc"]) or None
        )


def _path(places: tuple[int | str, ...]) -> str:
    path = ""
    for place in places:
        if isinstance(place, int):
            path += f"[{place}]"
        elif (
            place.isidentifier() and place.islower() and place not in ("str", "int", "bool")
        ):  # the rest are names of pydantic's, of the parts of a union
            path += f".{place}" if path else place
    return path


def _sentence(places: tuple[int | str, ...], problem: Any) -> str:
    name = _path(places) or "The body"
    if problem["type"] == "missing":
        return f"{name} is missing; see /openapi.json."
    wanted = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{name} is {shown(problem['input'])}; it {wanted.lower().replace('should', 'must', 1)}."


# ---- chat ----------------------------------------------------------------------------------------------------------


class ImageUrl(Body):
    """Where an image is."""

    url: Annotated[str, Field(description="a data URL with base64; an https URL where the server allows its host")]


class MessagePart(Body):
    """One part of a message: an image or a text."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Body):
    """One turn of a chat."""

    role: Literal["user", "system", "developer", "assistant", "tool"]
    content: str | list[MessagePart] | None = None


class ResponseFormat(Body):
    """The form of `content`."""

    type: Literal["text", "json_object"] = "text"


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None


class Inputs(Body):
    """What has no place in OpenAI's fields: `extra_body={"florence2": {...}}`."""

    box: Annotated[Box, Field(description="left, top, right, bottom in pixels")] | None = None
    text: Text | list[Text] | None = None
    num_beams: Beams | None = None
    max_new_tokens: Ids | None = None
    num_return_sequences: Beams | None = None
    confidence: bool | None = None


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)]
    model: str | None = None
    max_tokens: Ids | None = None
    max_completion_tokens: Ids | None = None
    n: Beams | None = None
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    florence2: Inputs | None = None


# ---- the typed route -----------------------------------------------------------------------------------------------


class ImageBody(Body):
    """An image: exactly one of its bytes, its URL, or the hash of one that was sent before."""

    data: Annotated[str, Field(description="the file in base64")] | None = None
    url: str | None = None
    sha256: Annotated[str, Field(description="of the bytes of an image that the server still keeps")] | None = None


class TaskBody(Body):
    """One task: a token, an alias, a free prompt, or "cascade"."""

    task: Text
    text: Text | list[Text] | None = None
    box: Box | None = None


class OptionsBody(Body):
    """Generation settings."""

    num_beams: Beams | None = None
    max_new_tokens: Ids | None = None
    num_return_sequences: Beams | None = None
    confidence: bool | None = None

    def changes(self) -> dict[str, Any]:
        """Return the settings that are given."""
        return {name: value for name in OptionsBody.model_fields if (value := getattr(self, name)) is not None}


class TasksBody(Body):
    """The body of `POST /v1/florence2`; in a form, its field `request`."""

    tasks: Annotated[list[TaskBody], Field(min_length=1, max_length=MAX_TASKS)]
    image: ImageBody | str | None = None
    options: OptionsBody | None = None
    model: str | None = None
    stream: bool | None = None
