"""The chapters still say what twelve questions need; whether a reader understands it, only a reader can tell."""

import pytest

from recipes.book.blocks import BOOK
from recipes.book.values import CHAPTERS
from tests.docs.questions import QUESTIONS, Question


def test_there_are_twelve_about_every_chapter() -> None:
    assert len(QUESTIONS) == 12 == len({question.text for question in QUESTIONS})
    assert {question.chapter for question in QUESTIONS} == set(CHAPTERS)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.text[:50])
def test_the_chapter_answers_it(question: Question) -> None:
    page = " ".join((BOOK / f"{question.chapter}.md").read_text(encoding="utf-8").split())
    for words in question.evidence:
        assert " ".join(words.split()) in page, words
