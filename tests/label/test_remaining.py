"""What is left of the work, in input order."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import ImageError, PromptError
from florence2.label.errors import ErrorLimit, parse_error_limit
from florence2.label.journal import Journal
from florence2.label.remaining import NO_QUESTION, Remaining
from florence2.label.sources.item import Item
from tests.label.conftest import ASKED, row

OTHER = TaskQuestion("<OD>")


class Page:
    """An image inside another file, which can be read until the next one is taken."""

    def __init__(self, name: str, opened: list[str]):
        self.place, self._opened = f"/x.tar!{name}", opened

    def read(self) -> bytes:
        self._opened.append(self.place)
        if self.place.endswith("torn"):
            raise ImageError("It is torn.")
        return self.place.encode()


def member(name: str, opened: list[str]) -> Item:
    return Item(Source(name, Page(name, opened), name, id=name))


def test_finished_images_are_not_read(tmp_path: Path) -> None:
    opened: list[str] = []
    items = [member(name, opened) for name in ("a", "b", "torn", "c")]
    with Journal(tmp_path, {}) as journal:
        journal(Row(items[1].source, ASKED, row("b").answer))
    with Journal(tmp_path, {}) as journal:
        remaining = Remaining(items, [ASKED], journal)
        left = list(remaining)
    assert [str(each.content) for each in left] == ["b'/x.tar!a'", "It is torn.", "b'/x.tar!c'"]
    assert opened == ["/x.tar!a", "/x.tar!torn", "/x.tar!c"]
    assert (remaining.left, remaining.skipped, remaining.complete, len(set(remaining.order))) == (3, 1, True, 4)


def test_an_image_has_its_own_questions_or_those_of_the_command(tmp_path: Path) -> None:
    source = row("a").source
    items = [Item(source, (OTHER,)), Item(source), Item(source, error="It is lost.")]
    with Journal(tmp_path, {}) as journal:
        left = list(Remaining(items, [ASKED, OTHER], journal))
        assert [list(each.questions) for each in left] == [[OTHER], [ASKED, OTHER], [ASKED]]
        assert str(left[2].content) == "It is lost."
        with pytest.raises(PromptError, match=r"Which task\? a brings no question of its own; add --task"):
            list(Remaining(items[1:], [], journal))
        _, silent, lost = Remaining(items, [], journal)  # one line without a task is one error
        assert str(silent.content).startswith("Which task? a brings") and silent.questions == [NO_QUESTION]
        journal(Row(lost.source, lost.questions[0], error="It is lost."))
        assert (tmp_path / "results.jsonl").read_text().count('"task": ""') == 1


def test_it_takes_no_more_than_is_needed(tmp_path: Path) -> None:
    taken = []

    def items() -> Iterator[Item]:
        for name in "abc":
            taken.append(name)
            yield Item(row(name).source)

    with Journal(tmp_path, {}) as journal:
        remaining = iter(Remaining(items(), [ASKED], journal))
        next(remaining)
        assert taken == ["a"]


@pytest.mark.parametrize(
    ("text", "failed", "rows", "exceeded"),
    [
        ("2", 2, 2, False),
        ("2", 3, 9, True),
        ("0", 1, 1, True),
        ("5%", 99, 99, False),
        ("5%", 5, 100, False),
        ("5%", 6, 100, True),
        ("0%", 1, 100, True),
    ],
)
def test_too_many_errors(text: str, failed: int, rows: int, exceeded: bool) -> None:
    assert parse_error_limit(text).is_exceeded(failed, rows) is exceeded
    assert not ErrorLimit().is_exceeded(failed, rows)
