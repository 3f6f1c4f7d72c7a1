"""What the server and the processes of its devices tell each other, over a pipe of their own."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from florence2.answers.answer import Answer
from florence2.asking.requests import CheckedRequest
from florence2.generation.options import GenerationOptions
from florence2.serve.work.jobs import Times
from florence2.serve.work.knowledge import Knowledge

# ---- to a device ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A job; `data` is None where the device should have the image of `key`."""

    number: int
    question: CheckedRequest | None
    options: GenerationOptions
    key: Hashable
    data: bytes | None
    times: Times
    deadline: float
    listens: bool


@dataclass(frozen=True)
class Leave:
    """Nobody waits for a job any more."""

    number: int


# ---- from a device -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    knowledge: Knowledge
    facts: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """The model could not be loaded."""

    error: Exception


@dataclass(frozen=True)
class Encoded:
    """Images were encoded together, for the metrics."""

    images: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """The decoder made one step, for the metrics."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Wrote:
    """The ids so far of an answer that somebody watches."""

    number: int
    ids: list[int]


@dataclass(frozen=True)
class JobDone:
    """A job was answered. `shape`, `size` and `image_size` are of the features of its image, and of the image."""

    number: int
    answer: Answer | None
    prompt_tokens: int
    times: Times
    shape: tuple[int, ...]
    size: int
    image_size: tuple[int, int]


@dataclass(frozen=True)
class JobFailed:
    """A job ended without an answer; None when its client left."""

    number: int
    error: Exception | None


@dataclass(frozen=True)
class Missing:
    """The image of a job is not here any more, and must be sent again."""

    number: int
