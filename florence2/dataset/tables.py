"""Rows as columns: the schema of the Parquet view and of Ray's workers, and the view of CSV.

`to_columns` needs nothing; `schema`, `to_table` and the Parquet view need pyarrow, the extra `parquet`.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence2.dataset.index import CASCADE, ImageRows, image_id, size_of
from florence2.dataset.regions import RegionReader
from florence2.dataset.views import WRONG_VALUES, View, ViewSettings, open_text, text_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_OF_PART = 50_000
_TEXTS = ("id", "image", "place", "task", "input", "detail", "error", "kind", "text", "raw_text", "finish_reason")
_SIZES = ("width", "height")
_NUMBERS = ("score", "confidence", "sequence_score", "min_confidence")
_SHAPES = {"boxes": "xyxy", "quads": "xyxyxyxy", "polygons": "rings"}
_REST = ("calibrated", "left_out", "missing")
COLUMNS = (*_TEXTS, *_SIZES, *_SHAPES, *_NUMBERS, *_REST)
"""The names of the columns, in their order."""


def to_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, which are the same for every task.

    Args:
        rows: Rows in the form of `Row.to_dict`, answered or with an error.

    Returns:
        A list for each of `COLUMNS`, with None where a row has no such value. "boxes", "quads" and "polygons" hold
        lists as rows have them, of {"xyxy" | "xyxyxyxy" | "rings", "label", "score", "confidence"}. A cascade gives the
        text of its caption, the boxes of its phrases, and their outlines. Alternatives are left out.

    Raises:
        KeyError, TypeError, ValueError: The values are not those of a row.
    """
    flat = [_flat(row) for row in rows]
    columns = {name: [row.get(name) for row in flat] for name in COLUMNS}
    columns["id"] = [image_id(row) for row in flat]
    sizes = [(None, None) if "error" in row else size_of(row) for row in flat]
    columns["width"], columns["height"] = [width for width, _ in sizes], [height for _, height in sizes]
    return columns


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose input is a text, and whose parts are on one level."""
    asked = row.get("input")
    if asked is not None and not isinstance(asked, str):  # a region is a list of numbers
        row = {**row, "input": json.dumps(asked)}
    if "caption" not in row:
        return row
    outlines = [polygon for segment in row["segments"] for polygon in segment.get("polygons", ())]
    joined = {"kind": CASCADE, "text": text_of(row), "image_size": list(size_of(row)), "polygons": outlines}
    kept = {name: value for name, value in row.items() if name not in ("caption", "grounding", "segments")}
    return {**kept, **joined, "boxes": row["grounding"].get("boxes", [])}


def schema() -> "pa.Schema":
    """Return the types of the columns, for pyarrow.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow as pa

    numbers = pa.list_(pa.float64())
    points = {"xyxy": numbers, "xyxyxyxy": numbers, "rings": pa.list_(numbers)}
    fields = [(name, pa.string()) for name in _TEXTS] + [(name, pa.int32()) for name in _SIZES]
    for name, key in _SHAPES.items():
        shape = [(key, points[key]), ("label", pa.string()), ("score", pa.float64()), ("confidence", pa.float64())]
        fields.append((name, pa.list_(pa.struct(shape))))
    fields += [(name, pa.float64()) for name in _NUMBERS]
    rest = zip(_REST, (pa.bool_(), pa.int32(), pa.list_(pa.string())), strict=True)
    return pa.schema([*fields, *rest])


def to_table(rows: Iterable[Mapping[str, Any]]) -> "pa.Table":
    """Return rows as a table of pyarrow with the columns of `to_columns`; lone surrogates become escapes.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        KeyError, TypeError, ValueError: The values are not those of a row.
    """
    import pyarrow as pa

    columns = to_columns(rows)
    try:
        return pa.table(columns, schema=schema())
    except UnicodeEncodeError:  # such as of a file whose name is not UTF-8
        return pa.table(_escape(columns), schema=schema())


def _escape(value: Any) -> Any:
    """Return JSON values whose texts can be written as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _escape(each) for key, each in value.items()}
    return [_escape(each) for each in value] if isinstance(value, list | tuple) else value


def _table_of_row(row: Mapping[str, Any]) -> "pa.Table | None":
    """Return the table of one row, or None where its values have other types."""
    try:
        return to_table([row])
    except WRONG_VALUES:
        return None


class Parquet(View):
    """Every row, failed ones too, in parts of `ROWS_OF_PART` rows; a folder for each part of a split."""

    with_failed = True

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        schema()  # a missing package is known before anything is written
        self._waiting: dict[str, list[dict[str, Any]]] = {part: [] for part in settings.split or [""]}
        self._parts = dict.fromkeys(self._waiting, 0)

    def add(self, image: ImageRows, split: str) -> None:
        """Keep the rows of an image until a part is full."""
        waiting = self._waiting[split]
        waiting += [*image.rows, *image.failed]
        if len(waiting) >= ROWS_OF_PART:
            self._write(split, waiting[:ROWS_OF_PART])
            del waiting[:ROWS_OF_PART]

    def _write(self, split: str, rows: list[dict[str, Any]]) -> None:
        from pyarrow import parquet

        path = self.folder / split / f"part-{self._parts[split]:05}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(self._table(rows), path)
        self._parts[split] += 1

    def _table(self, rows: list[dict[str, Any]]) -> "pa.Table":
        """Return rows as a table, without those whose values have other types."""
        import pyarrow as pa

        try:
            table = to_table(rows)
        except WRONG_VALUES:
            tables = filter(None, map(_table_of_row, rows))
            table = pa.concat_tables([schema().empty_table(), *tables])
            self.counts["damaged_rows"] += len(rows) - len(table)
        self.counts["rows"] += len(table)
        return table

    def finish(self) -> dict[str, Any]:
        """Write the last parts; a dataset without rows has one part all the same, which holds the columns."""
        for split, rows in self._waiting.items():
            if rows or not self._parts[split]:
                self._write(split, rows)
        return super().finish()


CSV_COLUMNS = (
    *("id", "image", "place", "width", "height", "task", "input", "text"),
    *("label", "score", "confidence", "left", "top", "right", "bottom", "outline"),
)


class Csv(View):
    """A line for each region, or for each text and each answer without regions: `rows.csv`, or a file for each part."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self.reader = RegionReader(settings.min_confidence)
        self._files = {part: open_text(folder / f"rows{end}.csv") for part, end in settings.endings.items()}
        self._writers = {part: csv.writer(file, lineterminator="\n") for part, file in self._files.items()}
        for writer in self._writers.values():
            writer.writerow(CSV_COLUMNS)

    def add(self, image: ImageRows, split: str) -> None:
        """Write the lines of an image."""
        lines = [line for row in image.rows for line in self._lines(image, row)]
        self._writers[split].writerows(lines)
        self.counts["images"] += 1
        self.counts["lines"] += len(lines)

    def _lines(self, image: ImageRows, row: Mapping[str, Any]) -> list[list[Any]]:
        asked = row.get("input")
        text = "" if asked is None else asked if isinstance(asked, str) else json.dumps(asked)
        regions = self.reader.read(row, size_of(row))
        shown = text_of(row) if "caption" in row or row.get("kind") == "text" else ""
        head = [image.id, row.get("image"), image.place, *size_of(row), row["task"], text, shown]
        if not regions:
            return [[*head, "", "", row.get("confidence"), *[""] * 5]]
        return [
            [*head, region.label, region.score, region.confidence, *region.box, json.dumps(region.rings)]
            if region.rings
            else [*head, region.label, region.score, region.confidence, *region.box, ""]
            for region in regions
        ]

    def finish(self) -> dict[str, Any]:
        """Close the files and return the counts."""
        self.close()
        self.counts += self.reader.counts
        return super().finish()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
