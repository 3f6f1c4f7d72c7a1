"""The rows that count: found once, read in the order of their ids."""

import json
from pathlib import Path

import pytest

from florence2.dataset.index import find_results, image_id, kind_of, open_index, size_of
from florence2.errors import OptionError
from tests.dataset.rows import boxes, caption, cascade, failed, row, write_rows


def test_later_rows_replace_earlier_ones(tmp_path: Path) -> None:
    old, new = boxes("b.jpg", ("cat", 0, 0, 9, 9)), boxes("b.jpg", ("dog", 0, 0, 9, 9))
    write_rows(tmp_path, [failed("a.jpg"), old, caption("b.jpg", "x"), boxes("a.jpg"), new])
    with open_index(tmp_path) as index:
        images = list(index.images())
    assert [(image.id, image.number) for image in images] == [("a.jpg", 1), ("b.jpg", 2)]
    assert images[0].rows == [boxes("a.jpg")] and images[0].failed == []
    assert images[1].rows == [caption("b.jpg", "x"), new]
    assert index.replaced == 2
    assert index.tasks == {("<OD>", "boxes"): 2, ("<CAPTION>", "text"): 1}


def test_other_inputs_and_details_are_other_rows(tmp_path: Path) -> None:
    rows = [boxes("a", input=text) for text in ("a cup", "a spoon", None)] + [boxes("a", input=[1, 2, 3, 4])]
    rows += [cascade("a"), cascade("a") | {"detail": "detailed"}]
    write_rows(tmp_path, rows)
    with open_index(tmp_path) as index:
        (image,) = index.images()
    assert len(image.rows) == 6 and index.replaced == 0


def test_a_failure_after_an_answer_counts(tmp_path: Path) -> None:
    """The image has changed: its old answer is out of date."""
    write_rows(tmp_path, [boxes("a"), failed("a")])
    with open_index(tmp_path) as index:
        (image,) = index.images()
    assert image.rows == [] and image.failed == [failed("a")]
    assert index.tasks == {("<OD>", "error"): 1}


def test_shards_are_read_together(tmp_path: Path) -> None:
    rows = [boxes(f"{i:02}.jpg", (f"label {i}", 0, 0, 9, 9)) for i in range(12)]
    write_rows(tmp_path / "one", rows)
    for shard in range(11):
        write_rows(tmp_path / "many", rows[shard::11], f"results.{shard}-of-11.jsonl")
    with open_index(tmp_path / "one") as one, open_index(tmp_path / "many") as many:
        assert list(one.images()) == list(many.images())
        assert many.missing_shards() == []
    (tmp_path / "many" / "results.10-of-11.jsonl").unlink()
    with open_index(tmp_path / "many") as many:
        assert many.missing_shards() == ["Only 10 of the 11 shards results.i-of-11.jsonl are in the folder."]
    names = [path.name for path in find_results(tmp_path / "many")]
    assert names[:3] == ["results.0-of-11.jsonl", "results.1-of-11.jsonl", "results.2-of-11.jsonl"]


def test_damage_is_counted(tmp_path: Path) -> None:
    write_rows(tmp_path, [boxes("a"), boxes("b"), boxes("c")])
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    torn = lines[1][:40] + b"\n"
    inside = lines[1].replace(b'"boxes": [', b'"boxes": [[')  # only parsing the whole line shows it
    (tmp_path / "results.jsonl").write_bytes(lines[0] + torn + inside + b"\xff\n" + lines[2][:-9])
    with open_index(tmp_path) as index:
        images = list(index.images())
    assert [image.id for image in images if image.rows] == ["a"]
    assert (index.damaged, index.unfinished, [image.damaged for image in images]) == (2, 1, [0, 1])


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """A labelling that ends compacts its results: the places of rows are those of the file that was opened."""
    write_rows(tmp_path, [boxes("a"), boxes("b")])
    with open_index(tmp_path) as index:
        write_rows(tmp_path / "new", [boxes("xyz" * 50)])
        (tmp_path / "new" / "results.jsonl").replace(tmp_path / "results.jsonl")
        assert [image.id for image in index.images()] == ["a", "b"]


def test_ids_that_stand_for_several_places(tmp_path: Path) -> None:
    moved = boxes("a") | {"place": "/moved/a"}
    write_rows(tmp_path, [boxes("a"), boxes("b"), moved])
    with open_index(tmp_path) as index:
        assert [image.place for image in index.images()] == ["/moved/a", "/photos/b"]
    assert index.moved == ["a"] and index.replaced == 1


def test_rows_without_ids() -> None:
    assert image_id({"image": "photos/a.jpg", "place": "/x/photos/a.jpg"}) == "photos/a.jpg"
    assert image_id({"image": "photos/a.jpg", "place": "/x", "id": "a"}) == "a"
    assert image_id({"place": "/x", "id": ""}) == "/x"


def test_kinds_and_sizes() -> None:
    assert [kind_of(each) for each in (boxes("a"), cascade("a"), failed("a"))] == ["boxes", "cascade", "error"]
    assert size_of(cascade("a")) == (200, 100)
    for size in ([200], [200, 0], [200, 1.5], [True, 1], None, "ab"):
        with pytest.raises((TypeError, ValueError)):
            size_of(row("a", image_size=size))


@pytest.mark.parametrize("escaped", ["a\\b.jpg", 'a"b.jpg', "ä\u2028b.jpg", "\ud800.jpg"])
def test_ids_with_escapes(tmp_path: Path, escaped: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(boxes(escaped)) + "\n")
    with open_index(tmp_path) as index:
        assert [image.id for image in index.images()] == [escaped]


def test_a_failure_without_a_task(tmp_path: Path) -> None:
    """A torn tar fails before anything is asked about its images."""
    write_rows(tmp_path, [boxes("a"), failed("t.tar", task="")])
    with open_index(tmp_path) as index:
        assert index.tasks == {("<OD>", "boxes"): 1, ("", "error"): 1}


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds no results.jsonl"):
        find_results(tmp_path)
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        find_results(tmp_path / "none")
    (tmp_path / "results.jsonl").touch()
    with open_index(tmp_path) as index:
        assert list(index.images()) == []
