"""Parquet tables by pyarrow: the images and ids in them, and what hostile ones cost."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from florence2.errors import ImageError, OptionError
from florence2.label.sources import tables
from florence2.label.sources.item import Item
from florence2.label.sources.opening import open_sources

Png = Callable[[int], bytes]
Save = Callable[..., Path]
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a table from columns, in row groups of two rows."""

    def save(name: str, columns: dict[str, Any], **options) -> Path:
        pq.write_table(pa.table(columns), tmp_path / name, **{"row_group_size": 2, **options})
        return tmp_path / name

    return save


def items(*paths: Path, **options) -> list[Item]:
    return list(open_sources([str(path) for path in paths], **options))


def ids(*paths: Path, **options) -> list[str | None]:
    return [item.source.id for item in items(*paths, **options)]


def problem(item: Item) -> str:
    with pytest.raises(ImageError) as raised:
        item.source.content()
    return str(raised.value)


def test_images_of_hugging_face(save: Save, png: Png, tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(png(2))
    values = [
        {"bytes": png(1), "path": "absent.png"},
        {"bytes": None, "path": "beside.png"},
        {"bytes": png(3), "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "absent.png"},
        {"bytes": None, "path": "https://x/y.png"},
    ]
    path = save("x.parquet", {"image": pa.array(values, HUGGING_FACE), "label": list(range(7))})
    found = items(path)
    assert [item.source.id for item in found] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [item.source.content() for item in found[:3]] == [png(1), png(2), png(3)]
    assert problem(found[3]) == problem(found[3]) == f"Row 3 of {path} has no image."
    assert problem(found[4]) == f"Row 4 of {path} has no image."
    assert problem(found[5]) == f"{tmp_path / 'absent.png'} cannot be read: No such file or directory."
    assert "is a URL, which is not fetched" in problem(found[6])
    assert found[1].source.content() == png(2)  # backwards
    assert found[2].source.place == found[2].source.name == f"{path}::2" and items(path) == found


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string()])
def test_columns_of_bytes_and_of_paths(save: Save, png: Png, tmp_path: Path, kind: pa.DataType) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    values = [f"{n}.png" if kind == pa.string() else png(n) for n in range(3)]
    path = save("x.parquet", {"data": pa.array([*values, None], kind), "name": ["a", "b", None, "a"]})
    found = items(path, image_column="data", id_column="name")
    assert [item.source.id for item in found] == ["a", "b", "2", "a-2"]
    assert [item.source.content() for item in found[:3]] == [png(0), png(1), png(2)]
    assert problem(found[3]) == f"Row 3 of {path} has no image."


def test_numbers_are_ids(save: Save, png: Png) -> None:
    path = save("x.parquet", {"image": [png(1)] * 3, "n": pa.array([5, -(2**63), None], pa.int64())})
    assert ids(path, id_column="n") == ["5", str(-(2**63)), "2"]


def test_no_image_is_read_before_it_is_wanted(save: Save, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("x.parquet", {"image": [png(n) for n in range(6)], "id": list("abcdef")})
    read: list[tuple[int, str]] = []
    batches = tables._batches

    def recorded(path: Path, file: object, group: int, column: str, rows: int) -> Iterator[Any]:
        read.append((group, column))
        yield from batches(path, file, group, column, rows)

    monkeypatch.setattr(tables, "_batches", recorded)
    found = []
    for item in open_sources([str(path)], id_column="id"):
        found += [item.source.content()] if item.source.id in "de" else []
    assert found == [png(3), png(4)]
    assert read == [(0, "id"), (1, "id"), (1, "image"), (2, "id"), (2, "image")]


def test_shards(save: Save, png: Png) -> None:
    one = save("one.parquet", {"image": [png(n) for n in range(7)]})
    assert [ids(one, shard=(part, 3)) for part in (1, 2, 3)] == [["0", "1", "6"], ["2", "3"], ["4", "5"]]
    assert ids(one, shard=(2, 5)) == ["1", "6"]  # fewer groups than shards
    two = save("two.parquet", {"image": [png(n) for n in range(2)]})
    assert ids(one, two, shard=(2, 2)) == ["two/0", "two/1"]


def test_the_column_must_be_clear(save: Save, png: Png) -> None:
    path = save("x.parquet", {"a": [png(1)], "b": [png(2)], "n": [1]})
    with pytest.raises(ImageError, match=r"has 2 columns that may hold images; .*--image-column.* a \(binary\), b"):
        items(path)
    with pytest.raises(ImageError, match=r"has no column 'c'. Its columns: a"):
        items(path, image_column="c")
    with pytest.raises(ImageError, match="The column n of .* has the type int64; images are bytes, paths, or"):
        items(path, image_column="n")
    with pytest.raises(ImageError, match="has no column 'c'"):
        items(path, image_column="a", id_column="c")
    with pytest.raises(ImageError, match="The column b of .* has the type binary; ids are text or whole numbers"):
        items(path, image_column="a", id_column="b")
    for column in ([1], [{"bytes": 1}], [{"bytes": b"x", "path": 1}], [{"path": "x"}]):
        none = save("y.parquet", {"n": column})
        with pytest.raises(ImageError, match="has no column of bytes; choose one"):
            items(none)


def test_columns_need_a_table(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="An image column is that of a .parquet table"):
        open_sources([str(tmp_path / "a.png")], image_column="image")
    with pytest.raises(OptionError, match="An id column is that of a .parquet table"):
        open_sources([str(tmp_path / "a.tar")], id_column="id")


def test_a_table_that_cannot_be_read_is_one_error_among_others(save: Save, png: Png) -> None:
    good, torn, other = (save(f"{name}.parquet", {"image": [png(1)]}) for name in "abc")
    torn.write_bytes(torn.read_bytes()[:-9])
    pq.write_table(pa.table({"n": [1]}), other)
    first, second, third = items(good, torn, other)
    assert first.error is None
    assert second.error == f"{torn} is not a Parquet table, or is cut off: it does not end as one does."
    assert third.error.startswith(f"{other} has no column of bytes")
    with pytest.raises(ImageError, match="is cut off"):
        items(torn)  # at once


@pytest.mark.parametrize(
    "end", [b"", b"PAR1", bytes(50) + b"\4\0\0\0PAR2", (2**32 - 1).to_bytes(4, "little") + b"PAR1"]
)
def test_files_that_do_not_end_as_parquet_does(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(end)
    with pytest.raises(ImageError, match="does not end as one does"):
        items(path)


def test_a_footer_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # a hole
        file.seek(0, 2)
        file.write((1 << 30).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ImageError, match=r"has a footer of 1,073,741,824 bytes; the limit is 64 MiB"):
        items(path)


def test_damaged_data_is_one_error_a_row(save: Save, png: Png) -> None:
    path = save("x.parquet", {"image": [png(n) for n in range(4)]}, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    found = items(path)
    assert all(problem(item).startswith(f"{path} cannot be read: ") for item in found[:2])
    assert [item.source.content() for item in found[2:]] == [png(2), png(3)]


def test_a_page_that_expands_to_gigabytes_is_not_unpacked(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("x.parquet", {"image": [bytes(4 << 20)]}, compression="zstd")
    assert len(items(path)[0].source.content()) == 4 << 20
    monkeypatch.setattr(tables, "MAX_EXPANDED_BYTES", 1 << 20)
    assert re.search(
        r"unpacks to 4,19\d,\d+ bytes, but the file has .* the limit is 100 times", problem(items(path)[0])
    )


def test_a_value_in_many_rows_is_unpacked_for_a_few(save: Save) -> None:
    """A column's dictionary holds it once, and all rows at once would be a hundred times as much."""
    path = save("x.parquet", {"image": [bytes(1 << 20)] * 100}, row_group_size=100)
    before = pa.total_allocated_bytes()
    most = 0
    for item in open_sources([str(path)]):
        item.source.content()
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20 << 20


def test_a_value_that_is_too_large(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_VALUE_BYTES", 1 << 20)
    large, fair = bytes((1 << 20) + 1), bytes(1 << 20)
    for kind, values in ((pa.binary(), [large, fair]), (HUGGING_FACE, [{"bytes": each} for each in (large, fair)])):
        path = save("x.parquet", {"image": pa.array(values, kind)})
        first, second = items(path)
        assert problem(first) == f"Row 0 of {path} holds 1,048,577 bytes; the limit of an image is 1 MiB."
        assert second.source.content() == fair
    (path.parent / "large.png").write_bytes(large)
    (item,) = items(save("y.parquet", {"image": ["large.png"]}), image_column="image")
    assert problem(item).endswith("large.png has more than 1 MiB, too much for an image.")


def test_without_pyarrow_only_tables_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from florence2.label.sources.opening import open_sources\n"
        "print(len(list(open_sources(['a.png']))))\n"
        "try: open_sources([sys.argv[1]])\n"
        "except ValueError as error: print(error)"
    )
    (tmp_path / "x.parquet").touch()
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x.parquet"], capture_output=True, text=True)
    count, sentence = run.stdout.splitlines()
    assert count == "1" and sentence.startswith("Parquet tables need the package pyarrow, which is not installed; ")
