"""The answers of folder runs: rows come as soon as they are known, and an error stays with its image."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from florence2.asking.questions import Runtime
from florence2.asking.requests import EncodedImage, PreparedImage
from florence2.bulk.rows import Question, Result, Row, RowKey
from florence2.bulk.sources import FileVersion, Source
from florence2.errors import Florence2Error

Q = TypeVar("Q", bound=Question)
Ask: TypeAlias = Callable[[Iterable[tuple[EncodedImage, Q] | Florence2Error]], Iterator[Result | Florence2Error]]
"""A function that answers (image, question) pairs in their order, taken as it has room; errors keep their places."""


def answer_images(
    model: Runtime,
    sources: Sequence[Source],
    questions: Sequence[Q],
    ask: Ask[Q],
    *,
    batch_size: int | None = None,
    done: Collection[RowKey] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """Ask every question about every image. The next images are read while the model works.

    Args:
        model: Prepares and encodes the images; each is encoded once for all its questions.
        sources: The images.
        questions: What to ask about each image.
        ask: Answers (image, question) pairs.
        batch_size: Number of images that an accelerator may encode together; None leaves it open.
        done: Keys of rows that an earlier run finished; they are left out.
        progress: Called with the number of finished images and their total, at the start and after each image.

    Yields:
        One row for each question about each image, image by image, with an answer or an error.
    """
    left = {source: [q for q in questions if Row(source, q).key not in done] for source in sources}
    waiting = [source for source, asked in left.items() if asked]
    coming: deque[Row] = deque()  # without their answers
    finished, report = 0, progress or (lambda *_: None)
    report(finished, len(waiting))

    versions: dict[Source, FileVersion | None] = {}

    def prepare(source: Source) -> PreparedImage:
        versions[source] = source.version()  # before the file is read, so that no later change goes unseen
        return model.prepare_image(source.content())

    def pairs() -> Iterator[tuple[EncodedImage, Q] | Florence2Error]:
        for source, image in model.encode_ahead(waiting, prepare, batch_size):
            version = versions.pop(source)
            for question in left[source]:
                coming.append(Row(source, question, version=version))
                yield image if isinstance(image, Florence2Error) else (image, question)

    for result in ask(pairs()):
        row = coming.popleft()
        yield _with_result(row, result)
        if row.question is left[row.source][-1]:
            finished += 1
            report(finished, len(waiting))


def _with_result(row: Row, result: Result | Florence2Error) -> Row:
    if isinstance(result, Florence2Error):
        return Row(row.source, row.question, error=str(result))
    return replace(row, answer=result)
