"""Find the image and the question in a chat."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from florence2.asking.requests import CheckedRequest
from florence2.errors import PromptError
from florence2.inputs.tasks import find_task
from florence2.serve.errors import RequestError
from florence2.serve.http.schemas import LONGEST_TEXT, ChatBody, Inputs, Message, MessagePart
from florence2.serve.incoming.images import GivenImage
from florence2.serve.service import Service

_INLINE_IMAGE = re.compile(r"""<img\s+src\s*=\s*(["'])(.*?)\1\s*/?>""", re.DOTALL)
_OTHER_TOKENS = {"<PHRASE_GROUNDING>": "<CAPTION_TO_PHRASE_GROUNDING>"}
"""Tokens of the published schema that the models know under another name."""


@dataclass(frozen=True)
class ChatQuestion:
    """The image and the question of a chat; `note` says why the answer may mean little."""

    image: GivenImage
    question: CheckedRequest
    text: str
    note: str | None = None


def find_question(chat: ChatBody, service: Service) -> ChatQuestion:
    """Return the latest image and the latest text of a chat. Raises RequestError or PromptError."""
    image: str | None = None
    text: str | None = None
    for message in reversed(chat.messages):
        if message.role == "user":
            images, texts = _parts(message)
            image = _only("image", images) if image is None else image
            text = _only("text", texts) if text is None else text
    if image is None:
        raise _missing("an image: a part of the type image_url with a data URL")
    if text is None:
        raise _missing("a text with a task, such as <CAPTION>")
    question, note = _check(text, chat.florence2 or Inputs(), service)
    return ChatQuestion(GivenImage(url=image), question, text, note)


def _parts(message: Message) -> tuple[list[str], list[str]]:
    """Return the images' URLs and the texts of one message."""
    content = message.content or []
    parts = [MessagePart(type="text", text=content)] if isinstance(content, str) else content
    images, texts = [], []
    for part in parts:
        if part.type == "image_url":
            if part.image_url is None:
                raise _missing("image_url in each part of the type image_url")
            images.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
        else:
            images += [found.group(2) for found in _INLINE_IMAGE.finditer(part.text or "")]
            texts.append(_INLINE_IMAGE.sub("", part.text or ""))
    if (longest := max(map(len, texts), default=0)) > LONGEST_TEXT:
        raise PromptError(f"A text has {longest:,} characters; it must have at most {LONGEST_TEXT:,}.")
    return images, [text for text in texts if text]


def _only(name: str, given: Sequence[str]) -> str | None:
    if len(given) > 1:
        raise RequestError(
            400,
            "unsupported_parameter",
            f"A message has {len(given)} {name}s; a question is about one image and has one text.",
            param="messages",
        )
    return given[0] if given else None


def _missing(name: str) -> RequestError:
    return RequestError(400, "invalid_prompt", f"The messages of the user lack {name}.", param="messages")


def _check(text: str, inputs: Inputs, service: Service) -> tuple[CheckedRequest, str | None]:
    """Return the question that a text asks, and a note where the model was not trained to read it.

    Raises PromptError for a text without a known task. The published models' endpoint answers anything after a task's
    token, as the reference does, and so does this route.
    """
    for other, token in _OTHER_TOKENS.items():
        text = text.replace(other, token)
    given = inputs.text if inputs.box is None else inputs.box
    if inputs.box is not None and inputs.text is not None:
        raise PromptError("florence2 has both text and box; give one.")
    try:
        return service.check(text, given), None
    except PromptError as error:
        task = find_task(text, service.model.processor.tasks)
        if given is not None or task is None or task.takes == "nothing" or text == task.alias:
            raise
        return CheckedRequest(task, b"", task.input_of(text)), str(error)


def unsupported(chat: ChatBody) -> Iterator[str]:
    """Yield the fields that ask for what this server cannot do."""
    extra = chat.model_extra or {}
    yield from (name for name in ("tools", "functions", "audio") if extra.get(name))
    if "audio" in (extra.get("modalities") or ()):
        yield "modalities"


_WITHOUT_EFFECT = """
    temperature top_p seed presence_penalty frequency_penalty logit_bias stop top_logprobs top_k min_p
    repetition_penalty best_of
""".split()


def ignored(chat: ChatBody) -> list[str]:
    """Return the fields that were given and have no effect."""
    extra = chat.model_extra or {}
    return [name for name in _WITHOUT_EFFECT if extra.get(name) is not None]
