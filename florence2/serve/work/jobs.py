"""A job: one question about one image, on its way from a client to its answer."""

import itertools
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from florence2.answers.answer import Answer
from florence2.asking.requests import CheckedRequest, EncodedImage, PreparedImage
from florence2.generation.options import GenerationOptions

_SERIALS = itertools.count()

Listener: TypeAlias = Callable[[list[int]], None]
"""Called in the worker's thread with the ids so far of a running answer."""


@dataclass(eq=False)
class HeldImage:
    """An image that jobs wait for: the bytes that a client sent, then its pixels, then its encoding.

    Attributes:
        key: What the image is known by, equal for equal bytes of clients who may share them.
        data: The file's bytes, as long as they may be needed.
        encoded: The encoded image, once it is.
        size: How many bytes it takes in the queue.
        users: How many jobs wait for it or use it.
        reading: The pixels to come.
        home: The process that has the image, where devices have processes of their own.
        serial: Tells it from every other held image.
    """

    key: Hashable
    data: bytes | None = field(default=None, repr=False)
    encoded: EncodedImage | None = None
    size: int = 0
    users: int = 0
    reading: "Future[PreparedImage] | None" = None
    home: Any = None
    serial: int = field(default_factory=_SERIALS.__next__)

    @property
    def is_ready(self) -> bool:
        """Whether a job could start with it, or fail because of it."""
        return self.encoded is not None or (self.reading is not None and self.reading.done())


@dataclass
class Times:
    """When a job reached its stages, in seconds of `time.monotonic`, and how long its image took to encode."""

    accepted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_id: float | None = None
    ended: float | None = None
    encoding: float = 0.0

    def in_ms(self) -> dict[str, float]:
        """Return the stages' lengths in milliseconds."""
        ended = time.monotonic() if self.ended is None else self.ended
        started = ended if self.started is None else self.started
        return {
            "queue_ms": _ms(started - self.accepted - self.encoding),
            "encode_ms": _ms(self.encoding),
            "decode_ms": _ms(ended - started),
        }


@dataclass(frozen=True)
class Answered:
    """What a job ends with: the encoded image, and the answer unless the image alone was wanted."""

    image: EncodedImage
    answer: Answer | None
    times: Times
    prompt_tokens: int
    cached: bool

    @property
    def image_tokens(self) -> int:
        """How many of the model's positions the image takes."""
        return int(self.image.features.shape[1])


@dataclass(eq=False)
class Job:
    """One question, or None to encode the image alone.

    Attributes:
        deadline: When it is given up, in seconds of `time.monotonic`.
        listener: Hears of an answer while it is being written.
        cached: Whether the image was encoded before the job came.
        ticket: What the engine knows it by, while it runs.
        given_back: Whether a process that had taken it has died.
    """

    question: CheckedRequest | None
    image: HeldImage
    options: GenerationOptions
    deadline: float
    listener: Listener | None = None
    cached: bool = False
    future: "Future[Answered]" = field(default_factory=Future)
    times: Times = field(default_factory=Times)
    ticket: Any = None
    given_back: bool = False

    @property
    def was_left(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.cancelled()

    def finish(self, answer: Answer | None, prompt_tokens: int) -> None:
        """Give the answer to whoever waits for it."""
        assert self.image.encoded is not None
        self.times.ended = time.monotonic()
        with suppress(InvalidStateError):  # nobody waits any more
            self.future.set_result(Answered(self.image.encoded, answer, self.times, prompt_tokens, self.cached))

    def fail(self, error: Exception) -> None:
        """Say why no answer will come."""
        self.times.ended = time.monotonic()
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
