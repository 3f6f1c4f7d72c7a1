"""Which questions about which images are left, found as the images are taken from their sources."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import FileVersion, Source
from florence2.errors import Florence2Error, ImageError, PromptError
from florence2.label.ahead import Taken
from florence2.label.journal import Journal
from florence2.label.keys import UNVERSIONED, question_part, source_key, version_state
from florence2.label.sources.item import Item

NO_QUESTION = TaskQuestion("")
"""Stands in the row of an image that cannot be located, where nothing was asked about it in particular."""


class Remaining:
    """The work of a run, in input order; iterate once.

    Attributes:
        order: The keys of all questions, in input order, as far as they were taken.
        taken: The number of images that were taken.
        left: The number of those with questions that are left.
        skipped: The number of questions that earlier runs have answered.
        complete: Whether all images were taken.
    """

    def __init__(self, items: Iterable[Item], questions: Sequence[TaskQuestion], journal: Journal):
        """Remaining to ask `questions`, or the images' own, except for those that the journal holds as answered."""
        self._items, self._questions, self._journal = items, tuple(questions), journal
        self._parts = {id(question): question_part(question.to_dict()) for question in self._questions}
        self.order: array[int] = array("Q")
        self.taken = self.left = self.skipped = 0
        self.complete = False

    def __iter__(self) -> Iterator[Taken]:
        """Yield each image with the questions that are left, unless none is.

        Raises PromptError if the first image has no questions of its own and the command has none.
        """
        for item in self._asked_about():
            questions = self._questions_of(item)
            version = item.source.version()  # before the file is read, so that no later change goes unseen
            left = [question for question in questions if not self._is_finished(item.source, question, version)]
            if left:
                self.left += 1
                yield Taken(item.source, left, version, _content(item))
        self.complete = True

    def take_all(self) -> None:
        """Take all images without reading them, for their order alone."""
        for item in self._asked_about():
            for question in self._questions_of(item):
                self.order.append(self._key(item.source, question))

    def _asked_about(self) -> Iterator[Item]:
        """Yield the images; one about which nothing is asked has an error, as any wrong line of a list."""
        for item in self._items:
            if item.error is None and not item.questions and not self._questions:
                problem = f"Which task? {item.source.name} brings no question of its own; add --task, as in --task od."
                if not self.taken:  # a forgotten option, and not one line
                    raise PromptError(problem)
                item = replace(item, error=problem)
            self.taken += 1
            yield item

    def _questions_of(self, item: Item) -> Sequence[TaskQuestion]:
        questions = self._questions if item.questions is None else item.questions
        return questions if item.error is None else questions[:1] or (NO_QUESTION,)

    def _is_finished(self, source: Source, question: TaskQuestion, version: FileVersion | None) -> bool:
        """Return whether the journal holds the answer about this version of the image."""
        key = self._key(source, question)
        self.order.append(key)
        if version is not None:
            state: int | None = version_state(version)
        else:  # of a file that is gone any version counts
            state = None if isinstance(source.data, Path) else UNVERSIONED
        finished = self._journal.finished.holds(key, state)
        self.skipped += finished
        return finished

    def _key(self, source: Source, question: TaskQuestion) -> int:
        part = self._parts.get(id(question)) or question_part(question.to_dict())
        return source_key(source, part, self._journal.by)


def _content(item: Item) -> Path | bytes | Florence2Error:
    """Return the content to open, before the next image is taken: bytes inside another file are gone then."""
    if item.error is not None:
        return ImageError(item.error)
    try:
        return item.source.content()
    except Florence2Error as error:
        return error
