"""The answers about many images: rows come as soon as they are known, and an error stays with its image."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

from florence2.asking.questions import Runtime
from florence2.asking.requests import EncodedImage, PreparedImage
from florence2.bulk.rows import Question, Result, Row, RowKey
from florence2.bulk.sources import FileVersion, Source
from florence2.errors import Florence2Error

Q = TypeVar("Q", bound=Question)
Arrival: TypeAlias = Callable[[int, Result | Florence2Error], None]
"""A function that is called with a pair's number from 0, and its result as soon as that is known."""
Ask: TypeAlias = Callable[
    [Iterable[tuple[EncodedImage, Q] | Florence2Error], Arrival], Iterator[Result | Florence2Error]
]
"""A function that answers (image, question) pairs in their order, taken as it has room; errors keep their places."""


@dataclass(frozen=True, eq=False)
class ImageQuestions(Generic[Q]):
    """One image and the questions about it, at least one; `version` is that of its file before it is read."""

    source: Source
    questions: Sequence[Q]
    version: FileVersion | None = None

    def prepare(self, model: Runtime) -> PreparedImage:
        """Read the image. Raises a Florence2Error for one that cannot be read."""
        return model.prepare_image(self.source.content())


class Rows(Generic[Q]):
    """The rows of many images, computed as they are taken; the next images are read while the model works.

    Iterate once. When Ctrl-C ends that, `waiting` has the rows whose answers are known and waited for a slower one.
    """

    def __init__(
        self,
        model: Runtime,
        work: Iterable[ImageQuestions[Q]],
        ask: Ask[Q],
        *,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ):
        """Ask questions about images.

        Args:
            model: Prepares and encodes the images; each is encoded once for all its questions.
            work: The images and their questions, taken as there is room for them.
            ask: Answers (image, question) pairs.
            batch_size: Number of images that an accelerator may encode together; None leaves it open.
            progress: Called with the number of finished images after each.
        """
        self._model, self._work, self._ask, self._batch_size = model, work, ask, batch_size
        self._progress = progress
        self._coming: dict[int, tuple[Row, bool]] = {}  # without answers, and whether each is its image's last
        self._arrived: dict[int, Result | Florence2Error] = {}

    def __iter__(self) -> Iterator[Row]:
        """Yield one row for each question about each image, image by image, with an answer or an error."""
        finished = 0
        for number, result in enumerate(self._ask(self._pairs(), self._arrived.__setitem__)):
            self._arrived.pop(number, None)
            row, last = self._coming.pop(number)
            yield _with_result(row, result)
            if last:
                finished += 1
                self._progress(finished)

    def waiting(self) -> list[Row]:
        """Return the rows that are known and were not yielded, in their order."""
        return [_with_result(self._coming[number][0], result) for number, result in sorted(self._arrived.items())]

    def _pairs(self) -> Iterator[tuple[EncodedImage, Q] | Florence2Error]:
        number = 0
        encoded = self._model.encode_ahead(self._work, lambda work: work.prepare(self._model), self._batch_size)
        for work, image in encoded:
            for count, question in enumerate(work.questions, 1):
                row = Row(work.source, question, version=work.version)
                self._coming[number] = row, count == len(work.questions)
                number += 1
                yield image if isinstance(image, Florence2Error) else (image, question)


def answer_images(
    model: Runtime,
    sources: Iterable[Source],
    questions: Sequence[Q],
    ask: Ask[Q],
    *,
    batch_size: int | None = None,
    done: Collection[RowKey] = frozenset(),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Rows[Q]:
    """Ask every question about every image.

    Args:
        model: Prepares and encodes the images.
        sources: The images.
        questions: What to ask about each image.
        ask: Answers (image, question) pairs.
        batch_size: Number of images that an accelerator may encode together; None leaves it open.
        done: Keys of rows that an earlier run finished; they are left out.
        progress: Called with the number of finished images and their total, at the start and after each image.

    Returns:
        The rows, computed as they are taken.
    """
    every = {source: [q for q in questions if Row(source, q).key not in done] for source in sources}
    left = {source: asked for source, asked in every.items() if asked}
    progress(0, len(left))
    # the version is taken when the image's turn comes, but before it is read, so that no later change goes unseen
    work = (ImageQuestions(source, asked, source.version()) for source, asked in left.items())
    return Rows(model, work, ask, batch_size=batch_size, progress=lambda finished: progress(finished, len(left)))


def _with_result(row: Row, result: Result | Florence2Error) -> Row:
    if isinstance(result, Florence2Error):
        return Row(row.source, row.question, error=str(result))
    return replace(row, answer=result)
