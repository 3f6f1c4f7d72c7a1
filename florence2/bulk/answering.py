"""The engine of folder runs: rows come as soon as they are known, and an error stays with its image."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from florence2.bulk.rows import Question, Result, Row, RowKey
from florence2.bulk.sources import FileVersion, Source
from florence2.errors import Florence2Error
from florence2.pipeline import EncodedImage, Florence2, PreparedImage

Q = TypeVar("Q", bound=Question)
Ask: TypeAlias = Callable[[Sequence[tuple[EncodedImage, Q]]], Sequence[Result]]
"""A function that answers (image, question) pairs together. It raises a Florence2Error when it refuses one of them."""
Images: TypeAlias = Mapping[Source, EncodedImage | str]
"""Each source's image, or the message why it could not be read."""


@dataclass(frozen=True)
class _Read:
    """An image that was read, or the message why it could not be, and the version of its file."""

    image: PreparedImage | str
    version: FileVersion | None


def answer_images(
    model: Florence2,
    sources: Sequence[Source],
    questions: Sequence[Q],
    ask: Ask[Q],
    *,
    batch_size: int = 1,
    done: Collection[RowKey] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """Ask every question about every image. The next images are read while the model works.

    Args:
        model: Prepares and encodes the images; each is encoded once for all its questions.
        sources: The images.
        questions: What to ask about each image.
        ask: Answers the pairs of one batch together.
        batch_size: Number of images in a batch, at least 1.
        done: Keys of rows that an earlier run finished; they are left out.
        progress: Called with the number of finished images and their total, at the start and after each image.

    Yields:
        One row for each question about each image, image by image, with an answer or an error.
    """
    report = progress or (lambda *_: None)
    left = {source: [q for q in questions if Row(source, q).key not in done] for source in sources}
    waiting = [source for source in sources if left[source]]
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    finished = 0
    report(finished, len(waiting))
    for batch, prepared in zip(batches, _read_ahead(model, batches), strict=True):
        images = _encode(model, {source: read.image for source, read in prepared.items()})
        results = _answer_batch(ask, [(images[source], question) for source in batch for question in left[source]])
        for source in batch:
            for question in left[source]:
                yield _to_row(source, question, next(results), prepared[source].version)
            finished += 1
            report(finished, len(waiting))


def _to_row(source: Source, question: Question, result: Result | str, version: FileVersion | None) -> Row:
    if isinstance(result, str):
        return Row(source, question, error=result)
    return Row(source, question, result, version=version)


def _read_ahead(model: Florence2, batches: Sequence[Sequence[Source]]) -> Iterator[dict[Source, _Read]]:
    """Yield the prepared images of each batch; a thread reads the next batch meanwhile."""
    if not batches:
        return
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(_prepare, model, batches[0])
        for following in batches[1:]:
            prepared = pending.result()
            pending = reader.submit(_prepare, model, following)
            yield prepared
        yield pending.result()


def _prepare(model: Florence2, sources: Sequence[Source]) -> dict[Source, _Read]:
    """Read every image, or say why it cannot be read."""

    def prepare(source: Source) -> _Read:
        version = source.version()  # before the file is read, so that no later change goes unseen
        try:
            return _Read(model.prepare_image(source.data), version)
        except Florence2Error as error:
            return _Read(str(error), version)

    return {source: prepare(source) for source in sources}


def _encode(model: Florence2, prepared: Mapping[Source, PreparedImage | str]) -> Images:
    """Encode every image that could be read."""
    readable = {source: image for source, image in prepared.items() if isinstance(image, PreparedImage)}
    try:
        encoded = dict(zip(readable, model.encode_images(list(readable.values())), strict=True))
    except Florence2Error as error:  # about the checkpoint's image size, and so the same for all
        return {source: str(error) for source in prepared}
    return {source: image if isinstance(image, str) else encoded[source] for source, image in prepared.items()}


def _answer_batch(ask: Ask[Q], work: Sequence[tuple[EncodedImage | str, Q]]) -> Iterator[Result | str]:
    """Yield the result of each question about an image, or the error of either."""
    pairs = [(image, question) for image, question in work if not isinstance(image, str)]
    results = iter(_answer_together(ask, pairs) if pairs else ())
    for image, _ in work:
        yield image if isinstance(image, str) else next(results)


def _answer_together(ask: Ask[Q], pairs: Sequence[tuple[EncodedImage, Q]]) -> list[Result | str]:
    """Answer all pairs at once; if that is refused, one by one, so that only the culprit fails."""
    try:
        return list(ask(pairs))
    except Florence2Error as error:
        if len(pairs) == 1:
            return [str(error)]
    return [result for pair in pairs for result in _answer_together(ask, [pair])]
