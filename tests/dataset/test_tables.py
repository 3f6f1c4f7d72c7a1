"""Rows as columns: Parquet, whose schema is the same for every task, and CSV."""

import csv
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from florence2.dataset import tables
from florence2.dataset.tables import COLUMNS, schema, to_columns, to_table
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from tests.dataset.rows import boxes, caption, cascade, failed, polygons, quads, write_rows

ROWS = [
    boxes("a.jpg", ("cat", 1.5, 2.5, 3.5, 4.5), input=[1.0, 2.0, 3.0, 4.0], finish_reason="stop", left_out=2),
    polygons("b.jpg", ("dog", [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]), input="a dog"),
    quads("c.jpg", ("STOP", [1.0, 1, 2, 1, 2, 2, 1, 2])),
    caption("d.jpg", "a cat", confidence=0.75, calibrated=True),
    cascade("e.jpg"),
    failed("f.jpg"),
]


def test_columns() -> None:
    columns = to_columns(ROWS)
    assert tuple(columns) == COLUMNS and {len(column) for column in columns.values()} == {6}
    assert columns["id"] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert columns["boxes"][0] == [{"xyxy": [1.5, 2.5, 3.5, 4.5], "label": "cat", "score": 0.25, "confidence": 0.5}]
    assert columns["polygons"][1][0]["rings"] == [[0, 0, 9, 0, 9, 9]] and columns["quads"][2][0]["label"] == "STOP"
    assert columns["input"] == ["[1.0, 2.0, 3.0, 4.0]", "a dog", None, None, None, None]
    assert (columns["kind"][4], columns["text"][4], columns["detail"][4]) == ("cascade", "a cup and a spoon", "brief")
    assert [box["label"] for box in columns["boxes"][4]] == ["a cup", "a spoon"] and len(columns["polygons"][4]) == 1
    assert columns["error"] == [None] * 5 + ["f.jpg cannot be read."] and columns["boxes"][5] is None
    assert columns["width"] == [200] * 5 + [None] and columns["left_out"][0] == 2


def test_a_table_has_one_schema_whatever_it_holds() -> None:
    for rows in (ROWS, ROWS[5:], []):
        assert to_table(rows).schema == schema()
    assert to_table(ROWS).to_pylist()[0]["boxes"] == ROWS[0]["boxes"]
    assert schema().names == list(COLUMNS)


def test_names_of_files_that_are_not_utf_8() -> None:
    table = to_table([boxes("a.jpg"), caption("\udcff.jpg", "a cat"), boxes("b", ("\ud800", 1, 2, 3, 4))])
    assert table.column("id").to_pylist() == ["a.jpg", "\\udcff.jpg", "b"]
    assert table.column("boxes").to_pylist()[2][0]["label"] == "\\ud800"


def test_parquet_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_OF_PART", 4)
    source = write_rows(tmp_path / "rows", ROWS)
    report = write_views(source, ["parquet"], tmp_path / "out")
    parts = sorted((tmp_path / "out" / "parquet").iterdir())
    assert [path.name for path in parts] == ["part-00000.parquet", "part-00001.parquet"]
    assert pa.concat_tables(parquet.read_table(path) for path in parts).equals(to_table(ROWS))
    assert report.report["parquet"]["counts"] == {"rows": 6} and report.complete
    written = [path.read_bytes() for path in parts]
    write_views(source, ["parquet"], tmp_path / "out")
    assert [path.read_bytes() for path in parts] == written


def test_parquet_leaves_damaged_rows_out(tmp_path: Path) -> None:
    wrong = [
        boxes("w", ("cat", 1, 2, "x", 4)),
        caption("x", 7),
        caption("y", "a", score=[1]),
        boxes("z", image_size=[1]),
    ]  # type: ignore[arg-type]
    report = write_views(write_rows(tmp_path / "rows", [*ROWS, *wrong]), ["parquet"], tmp_path / "out")
    assert report.report["parquet"]["counts"] == {"rows": 6, "damaged_rows": 4} and not report.complete
    assert len(parquet.read_table(tmp_path / "out" / "parquet" / "part-00000.parquet")) == 6


def test_parts_of_a_split(tmp_path: Path) -> None:
    rows = [boxes(str(i)) for i in range(20)]
    settings = ViewSettings(split={"train": 0.5, "val": 0.5})
    write_views(write_rows(tmp_path / "rows", rows), ["parquet", "csv"], tmp_path / "out", settings=settings)
    tables = [parquet.read_table(tmp_path / "out/parquet" / part / "part-00000.parquet") for part in settings.split]
    assert sorted(id for table in tables for id in table["id"].to_pylist()) == sorted(row["id"] for row in rows)
    lines = [(tmp_path / f"out/csv/rows_{part}.csv").read_text().count("\n") for part in settings.split]
    assert sum(lines) == 20 + 2 and min(lines) > 1


def test_csv(tmp_path: Path) -> None:
    report = write_views(
        write_rows(tmp_path / "rows", [*ROWS, boxes("g.jpg")]),
        ["csv"],
        tmp_path / "out",
        settings=ViewSettings(min_confidence=0.4),
    )
    with (tmp_path / "out" / "csv" / "rows.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "e.jpg", "g.jpg"]
    assert [lines[0][name] for name in ("label", "left", "top", "right", "bottom")] == [
        "cat",
        "1.5",
        "2.5",
        "3.5",
        "4.5",
    ]
    assert lines[0]["input"] == "[1.0, 2.0, 3.0, 4.0]" and lines[1]["outline"] == "[[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]"
    assert (lines[3]["text"], lines[3]["confidence"]) == ("a cat", "0.75")
    assert lines[4]["text"] == "a cup and a spoon" and lines[6]["label"] == ""
    assert report.report["csv"]["counts"] == {"images": 6, "lines": 7}
