"""A folder of images, and the answers of the small checkpoint to questions about them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.bulk.answering import answer_images
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import Florence2Error, PromptError
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

    def ask(
        pairs: Iterable[tuple[florence2.EncodedImage, TaskQuestion] | Florence2Error], arrived: Any
    ) -> Iterator[Any]:
        requests = (p if isinstance(p, Florence2Error) else (p[1].task, p[0], p[1].text) for p in pairs)
        return small.stream(requests, options=options, batch_size=2, arrived=arrived)

    def answer(sources: list[Source], questions: list[TaskQuestion], **changes) -> list[Row]:
        return list(answer_images(small, sources, questions, **{"ask": ask, **changes}))

    return answer


def stop_after(count: int) -> Callable[..., Iterator[Florence2Error]]:
    """Return what answers some pairs until Ctrl-C; the second is slow, so that all after the first wait for it."""

    def ask(pairs: Iterable[Any], arrived: Any) -> Iterator[Florence2Error]:
        pairs = iter(pairs)
        for number in range(count):
            next(pairs)
            if number != 1:
                arrived(number, PromptError(f"answer {number}"))
            if number == 0:
                yield PromptError("answer 0")
        raise KeyboardInterrupt

    return ask
