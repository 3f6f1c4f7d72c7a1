"""The next images are read by other processes while the model works, in their order and within a limit of bytes."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from florence2.asking.questions import Runtime
from florence2.asking.requests import PreparedImage
from florence2.bulk.answering import ImageQuestions
from florence2.bulk.rows import TaskQuestion
from florence2.errors import Florence2Error, ImageError
from florence2.label.decoding import Decoders

MAX_WAITING_BYTES = 512 << 20
"""Pixels of images that wait for the model, in total."""
_RECENT = 64  # images by which the size of the next ones is judged


@dataclass(frozen=True, eq=False)
class Taken(ImageQuestions[TaskQuestion]):
    """An image that was taken from its source: `content` is what to open, or its pixels, or why it cannot be read."""

    content: Path | bytes | PreparedImage | Florence2Error = b""

    def prepare(self, model: Runtime) -> PreparedImage:
        """Return the pixels; read the image if no process has done so. Raises a Florence2Error."""
        if isinstance(self.content, Florence2Error):
            raise self.content
        return self.content if isinstance(self.content, PreparedImage) else model.prepare_image(self.content)


@dataclass
class Waited:
    """How long the model has waited for images, in seconds."""

    seconds: float = 0.0


def read_ahead(work: Iterable[Taken], decoders: Decoders, most: int, waited: Waited) -> Iterator[Taken]:
    """Yield each image with its pixels, or why it cannot be read, in the same order.

    Args:
        work: The images; the next are taken while earlier ones are read.
        decoders: What reads them.
        most: How many images are taken before they are needed, at most.
        waited: Counts the time that this generator takes.

    Raises:
        OptionError: No process can be started.
    """
    coming, sizes = iter(work), deque([decoders.room], _RECENT)
    pending: deque[tuple[Taken, Future[PreparedImage] | None]] = deque()
    while True:
        started = time.perf_counter()
        room = max(2 * decoders.count, min(most, MAX_WAITING_BYTES // (max(sizes) or 1)))
        while len(pending) < room and (next_one := next(coming, None)) is not None:
            pending.append((next_one, _submit(next_one, decoders)))
            sizes.append(len(next_one.content) if isinstance(next_one.content, bytes) else 0)
        if not pending:
            break
        taken, reading = pending.popleft()
        read = taken if reading is None else replace(taken, content=_result(reading))
        if isinstance(read.content, PreparedImage):
            sizes.append(read.content.pixels.nbytes)
        waited.seconds += time.perf_counter() - started
        yield read


def _submit(taken: Taken, decoders: Decoders) -> "Future[PreparedImage] | None":
    content = taken.content
    return decoders.submit(taken.source.name, content) if isinstance(content, Path | bytes) else None


def _result(reading: "Future[PreparedImage]") -> PreparedImage | ImageError:
    try:
        return reading.result()
    except ImageError as error:
        return error
