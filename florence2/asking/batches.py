"""Requests that come one after the other, taken in parts and answered together."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeAlias, TypeVar

from florence2.answers.answer import Answer
from florence2.asking.requests import Arrived, CheckedRequest, EncodedImage
from florence2.errors import Florence2Error

Item = TypeVar("Item")
Asked: TypeAlias = tuple[CheckedRequest, EncodedImage]


class Coming(Generic[Item]):
    """Items to come; `failure` is what the iterable raised, after which none come."""

    def __init__(self, items: Iterable[Item]):
        self._items = iter(items)
        self.failure: Exception | None = None

    def take(self, count: int) -> Iterator[Item]:
        """Yield the next `count` items, or those that are left."""
        while count > 0 and self.failure is None:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001  of the caller's
                self.failure = error
                return
            count -= 1
            yield item


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`; the last may be shorter. If `items` raises, what it gave comes first."""
    coming = Coming(items)
    while part := list(coming.take(size)):
        yield part
    if coming.failure is not None:
        raise coming.failure


def answer_in_batches(
    answer: Callable[[Sequence[Asked]], Iterable[Answer]],
    asked: Iterable[Asked | Florence2Error],
    size: int,
    arrived: Arrived,
) -> Iterator[Answer | Florence2Error]:
    """Answer requests, `size` at a time; yield for each its answer, or the error that kept it from one.

    Args:
        answer: Answers requests together. If it raises a Florence2Error, it is called again for each of them alone.
        asked: The requests, or errors.
        size: How many are answered together.
        arrived: Called with a request's number from 0 and its answer or error, as soon as that is known.
    """
    numbers = itertools.count()
    for part in in_parts(asked, size):
        answers = iter(_answer_together(answer, [each for each in part if not isinstance(each, Florence2Error)]))
        settled = [each if isinstance(each, Florence2Error) else next(answers) for each in part]
        for result in settled:
            arrived(next(numbers), result)
        yield from settled


def _answer_together(
    answer: Callable[[Sequence[Asked]], Iterable[Answer]], asked: Sequence[Asked]
) -> list[Answer | Florence2Error]:
    """Answer requests at once; if that is refused, one by one, so that only the culprit fails."""
    if not asked:
        return []
    try:
        return list(answer(asked))
    except Florence2Error as error:
        if len(asked) == 1:
            return [error]
    return [result for each in asked for result in _answer_together(answer, [each])]
