"""A folder of images, and the answers of the small checkpoint to questions about them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import florence2
from florence2.bulk.answering import answer_images
from florence2.bulk.rows import Result, Row, TaskQuestion
from florence2.bulk.sources import Source
from parity.recipe import make_picture

Answering = Callable[..., list[Row]]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Five files, of which the third is not an image and the last is in a folder below, and one of another kind."""
    folder = tmp_path / "album"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "d.png", "deeper/a.png"):
        make_picture(len(name), 40, 30).save(folder / name)
    (folder / "c.png").write_text("not an image")
    (folder / "notes.txt").write_text("ignored")
    return folder


@pytest.fixture
def answer(small: florence2.Florence2) -> Answering:
    """Answer questions in at most six tokens, two images at a time."""
    options = small.options(max_new_tokens=6)

    def ask(pairs: Sequence[tuple[florence2.EncodedImage, TaskQuestion]]) -> Sequence[Result]:
        requests = [(question.task, image, question.text) for image, question in pairs]
        return small.run_batch(requests, options=options)

    def answer(sources: list[Source], questions: list[TaskQuestion], **changes) -> list[Row]:
        return list(answer_images(small, sources, questions, **{"ask": ask, "batch_size": 2, **changes}))

    return answer
