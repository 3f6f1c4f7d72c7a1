"""Many images: an error stays with its image, and each image is encoded once."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.bulk.answering import answer_images
from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import find_images
from florence2.errors import Florence2Error, PromptError
from parity.recipe import make_picture
from tests.bulk.conftest import Answering, stop_after
from tests.conftest import count_encodings


def test_one_bad_image_costs_its_own_rows(small: florence2.Florence2, album: Path, answer: Answering) -> None:
    rows = answer(find_images([str(album)]), [TaskQuestion("<OD>"), TaskQuestion("<CAPTION>")])
    assert len(rows) == 10
    failed = [row for row in rows if row.error]
    assert [row.source.stem for row in failed] == ["c", "c"] and str(album / "c.png") in failed[0].error
    alone = small.run("<OD>", album / "d.png", options=small.options(max_new_tokens=6))
    (answered,) = [row.answer for row in rows if row.source.stem == "d" and row.question.name == "<OD>"]
    assert isinstance(answered, florence2.Answer) and answered.token_ids == alone.token_ids


def test_a_box_outside_one_image_fails_there_alone(tmp_path: Path, answer: Answering) -> None:
    for name, width in (("wide.png", 100), ("slim.png", 20)):
        make_picture(1, width, 50).save(tmp_path / name)
    rows = answer(find_images([str(tmp_path)]), [TaskQuestion("<REGION_TO_OCR>", (30, 5, 60, 20))])
    assert [(row.source.stem, row.error is None) for row in rows] == [("slim", False), ("wide", True)]
    assert "20 x 50" in rows[0].error


def test_an_image_is_encoded_once_for_all_questions(
    small: florence2.Florence2, album: Path, answer: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_encodings(small, monkeypatch)
    questions = [TaskQuestion("<OD>"), TaskQuestion("<CAPTION>"), TaskQuestion("Where?")]
    rows = answer(find_images([str(album / "a.png")]), questions)
    assert sum(calls) == 1 and [row.question for row in rows] == questions


def test_refused_pairs_keep_their_places(album: Path, answer: Answering) -> None:
    def refuse_all(pairs: Iterable[object], arrived: object) -> Iterator[Florence2Error]:
        return (pair if isinstance(pair, Florence2Error) else PromptError("no") for pair in pairs)

    rows = answer(find_images([str(album)]), [TaskQuestion("<OD>")], ask=refuse_all)
    assert [row.source.stem for row in rows] == ["a", "b", "c", "d", "deeper/a"]
    assert [row.error == "no" for row in rows] == [True, True, False, True, True]


def test_images_are_encoded_as_there_is_room(
    small: florence2.Florence2, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row comes before the images after it are encoded, but for those that run with it."""
    calls = count_encodings(small, monkeypatch)
    sources = find_images([str(album / name) for name in ("a.png", "b.jpg", "d.png")])

    def ask(pairs: Iterable[Any], arrived: Any) -> Iterator[Any]:
        requests = (("<CAPTION>", image) for image, _ in pairs)
        return small.stream(requests, options=small.options(max_new_tokens=6), batch_size=1)

    rows = answer_images(small, sources, [TaskQuestion("<CAPTION>")], ask)
    encoded = []
    for _ in rows:
        encoded.append(sum(calls))
    assert encoded == [1, 2, 3]


def test_a_row_knows_the_version_of_its_file(album: Path, answer: Answering) -> None:
    (row,) = answer(find_images([str(album / "a.png")]), [TaskQuestion("<OD>")])
    assert row.version == row.source.version() is not None
    make_picture(9, 40, 30).save(album / "a.png")
    assert row.version != row.source.version()


def test_rows_as_json(album: Path, answer: Answering) -> None:
    questions = [TaskQuestion("od"), TaskQuestion("<OPEN_VOCABULARY_DETECTION>", ["a", "b"]), TaskQuestion("Where?")]
    rows = [row.to_dict() for row in answer(find_images([str(album / "a.png"), "absent.png"]), questions)]
    assert [row["task"] for row in rows] == ["<OD>", "<OPEN_VOCABULARY_DETECTION>", "Where?"] * 2
    assert rows[1]["input"] == ["a", "b"]
    assert rows[3]["image"] == "absent.png" and rows[3]["place"] == str(Path("absent.png").absolute())
    assert rows[3]["error"].startswith("absent.png does not exist")
    assert all(json.loads(json.dumps(row)) for row in rows)


def test_progress_counts_finished_images(album: Path, answer: Answering) -> None:
    """Those that an earlier run finished are not counted."""
    calls: list[tuple[int, int]] = []
    sources, questions = find_images([str(album)]), [TaskQuestion("<OD>"), TaskQuestion("<CAPTION>")]
    first = answer(sources[:1], questions)
    answer(sources, questions, done={row.key for row in first}, progress=lambda *call: calls.append(call))
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_ctrl_c_leaves_the_answers_that_wait_for_a_slower_one(small: florence2.Florence2, album: Path) -> None:
    """Also where it comes from inside the model; a question that is still running has no row."""
    rows = answer_images(small, find_images([str(album)]), [TaskQuestion("<OD>")], stop_after(5))
    given = []
    with pytest.raises(KeyboardInterrupt):
        for row in rows:
            given.append(row.error)
    assert given == ["answer 0"]
    assert [(row.source.stem, row.error) for row in rows.waiting()] == [
        ("c", "answer 2"),
        ("d", "answer 3"),
        ("deeper/a", "answer 4"),
    ]
