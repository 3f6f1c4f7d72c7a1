"""Parquet tables, those of Hugging Face among them: each row is an image, read one row group after another.

An image column holds bytes, paths, or both, as `datasets` writes its images. Its values are read only where an image
is wanted; without that, the ids alone are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florence2.bulk.sources import Source
from florence2.errors import ImageError, OptionError, clip, listing, shown
from florence2.inputs.files import check_regular, url_problem
from florence2.label.sources.item import Item, error_item, safe_stem

MAX_VALUE_BYTES = 256 << 20
MAX_FOOTER_BYTES = 64 << 20
MAX_EXPANDED_BYTES = 256 << 20
"""A row group that becomes larger than this when it is unpacked may grow by `MAX_EXPANSION`."""
MAX_EXPANSION = 100
MAX_GROUP_ROWS = 10_000_000
_ROWS = 4  # that are unpacked at once: a value of a few bytes in the file may stand in many rows
_ID_ROWS = 4096
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Columns:
    """The columns of a table to read; None chooses the only one that can hold images, and numbers as ids."""

    image: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class TableImage:
    """The `Source.data` of an image in a row of a table. `group` reads it."""

    path: Path
    row: int
    group: "_Group" = field(compare=False, repr=False)

    @property
    def place(self) -> str:
        """The absolute path of the table, two colons, and the number of the row from 0."""
        return f"{self.path.absolute()}::{self.row}"

    def read(self) -> bytes:
        """Return the bytes of the image. Raises ImageError."""
        value = self.group.value(self.row)
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            return _read_file(self.path.parent, value)
        if value is None:
            raise ImageError(f"Row {self.row} of {self.path} has no image.")
        return bytes(value)


def read_table(path: Path, columns: Columns, prefix: str = "", shard: tuple[int, int] = (0, 1)) -> Iterator[Item]:
    """Yield the images of a table in their order.

    Args:
        path: The table.
        columns: Which columns to read.
        prefix: Begins the ids that are row numbers, such as the table's own name where there are several.
        shard: (index, n) takes the row groups with this index modulo n; the rows, where there are fewer groups.
    """
    try:
        yield from _Table(path, columns).items(prefix, *shard)
    except ImageError as error:
        yield error_item(str(path), str(path.absolute()), str(error))


def check_table(path: Path, columns: Columns) -> None:
    """Raise ImageError for a table that cannot be read or lacks the columns, OptionError if pyarrow is missing."""
    _Table(path, columns)


class _Table:
    """An open table. It is closed with the last of its images, which may be read after the next has been taken."""

    def __init__(self, path: Path, columns: Columns):
        self._path, pyarrow = path, import_pyarrow()
        with _readable(path):
            check_footer(path)
            # without a buffer of its own, a whole column of a row group would be read at once
            self._file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            self._image = _find_image_column(path, self._file.schema_arrow, columns.image)
            self._id = None if columns.id is None else _find_id_column(path, self._file.schema_arrow, columns.id)

    def items(self, prefix: str, index: int, shards: int) -> Iterator[Item]:
        groups, start = self._file.num_row_groups, 0
        for number in range(groups):
            rows = self._file.metadata.row_group(number).num_rows
            if groups < shards or number % shards == index:
                for item in self._group_items(number, start, rows, prefix):
                    row = item.source.data.row if isinstance(item.source.data, TableImage) else start
                    if groups >= shards or row % shards == index:
                        yield item
            start += rows

    def _group_items(self, number: int, start: int, rows: int, prefix: str) -> Iterator[Item]:
        if rows > MAX_GROUP_ROWS:
            name = f"{self._path} row group {number}"
            problem = f"{name} has {rows:,} rows; the limit is {MAX_GROUP_ROWS:,}."
            yield error_item(name, f"{self._path.absolute()}::{start}", problem)
            return
        group = _Group(self._path, self._file, self._image, number, start)
        row = start
        try:
            for id in self._ids(number, rows):
                name = f"{self._path}::{row}"
                whole = f"{prefix}{row}" if id is None else id
                yield Item(Source(name, TableImage(self._path, row, group), safe_stem(whole), whole))
                row += 1
        except ImageError as error:
            name = f"{self._path} row group {number}"
            yield error_item(name, f"{self._path.absolute()}::{row}", f"{name}: {error}")

    def _ids(self, number: int, rows: int) -> Iterator[str | None]:
        """Yield the ids of a row group; None for a row that has none."""
        if self._id is None:
            yield from (None for _ in range(rows))
            return
        for batch in _batches(self._path, self._file, number, self._id, _ID_ROWS):
            with _readable(self._path):  # a text may be none
                values = batch.column(0).to_pylist()
            yield from (None if value is None else str(value) for value in values)


class _Group:
    """The images of one row group, unpacked a few rows at a time as they are taken in their order."""

    def __init__(self, path: Path, file: Any, column: str, number: int, start: int):
        self._path, self._file, self._column, self._number, self._start = path, file, column, number, start
        self._begin()

    def _begin(self) -> None:
        self._batches = _batches(self._path, self._file, self._number, self._column, _ROWS)
        self._rows: Any = ()
        self._problem: str | None = None
        self._first = self._start  # the row of the table that `_rows` begins with

    def value(self, row: int) -> Any:
        """Return the value of a row, as bytes, text, or a dictionary of them. Raises ImageError."""
        if row < self._first:
            self._begin()
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = ()
            self._rows = self._next_rows(row)
        scalar = self._rows[row - self._first]
        _check_size(self._path, row, scalar)
        with _readable(self._path):
            return scalar.as_py()

    def _next_rows(self, row: int) -> Any:
        """Return the values of the next rows. The error of damaged ones stays that of all after them."""
        try:
            batch = None if self._problem else next(self._batches, None)
        except ImageError as error:
            batch, self._problem = None, str(error)
        if batch is None:
            shorter = f"Row {row} of {self._path} is missing: its row group has fewer rows than it states."
            raise ImageError(self._problem or shorter)
        return batch.column(0)


def _batches(path: Path, file: Any, number: int, column: str, rows: int) -> Iterator[Any]:
    """Yield a column of a row group in batches. Raises ImageError."""
    with _readable(path):
        _check_expansion(path, file.metadata.row_group(number), number)
        yield from file.iter_batches(batch_size=rows, row_groups=[number], columns=[column], use_threads=False)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise ImageError in place of an error of pyarrow, which for a damaged file may be one of Python's too."""
    arrow = import_pyarrow().ArrowException  # now, because nothing can be imported when the interpreter exits
    try:
        yield
    except (ImageError, OptionError):
        raise
    except (OSError, ValueError, LookupError, TypeError, arrow) as error:
        raise _unreadable(path, error) from None


def _check_expansion(path: Path, group: Any, number: int) -> None:
    """Raise ImageError for a row group whose few bytes become gigabytes: images are packed already.

    It is compared with the whole file. What a damaged file says of a single column can abort the process.
    """
    packed, unpacked = path.stat().st_size, group.total_byte_size
    if unpacked > MAX_EXPANDED_BYTES and unpacked > packed * MAX_EXPANSION:
        raise ImageError(
            f"Row group {number} of {path} unpacks to {unpacked:,} bytes, but the file has {packed:,}; "
            f"the limit is {MAX_EXPANSION} times as much."
        )


def _check_size(path: Path, row: int, scalar: Any) -> None:
    parts = [scalar[name] for name in ("bytes", "path") if name in scalar] if hasattr(scalar, "keys") else [scalar]
    sizes = [part.as_buffer().size for part in parts if part.is_valid]
    if any(size > MAX_VALUE_BYTES for size in sizes):
        raise ImageError(
            f"Row {row} of {path} holds {max(sizes):,} bytes; the limit of an image is {MAX_VALUE_BYTES >> 20} MiB."
        )


def _find_image_column(path: Path, schema: Any, name: str | None) -> str:
    """Return the column that holds the images. Raises ImageError."""
    able = [column.name for column in schema if _holds_images(column.type)]
    if name is None and len(able) == 1:
        return str(able[0])
    columns = listing([f"{column.name} ({clip(column.type, 60)})" for column in schema])
    if name is None:
        why = f"{len(able)} columns that may hold images" if able else "no column of bytes"
        raise ImageError(f"{path} has {why}; choose one with --image-column. Its columns: {columns}.")
    if name not in schema.names:
        raise ImageError(f"{path} has no column {name!r}. Its columns: {columns}.")
    column = schema.field(name)
    if not (_holds_images(column.type) or _is_text(column.type)):
        raise ImageError(
            f"The column {name} of {path} has the type {clip(column.type)}; images are bytes, paths, "
            "or a struct with the fields bytes and path."
        )
    return name


def _find_id_column(path: Path, schema: Any, name: str) -> str:
    """Return the column that holds the ids. Raises ImageError."""
    if name not in schema.names:
        raise ImageError(f"{path} has no column {name!r}. Its columns: {listing(schema.names)}.")
    kind = schema.field(name).type
    if not (_is_text(kind) or import_pyarrow().types.is_integer(kind)):
        raise ImageError(f"The column {name} of {path} has the type {clip(kind)}; ids are text or whole numbers.")
    return name


def _holds_images(kind: Any) -> bool:
    types = import_pyarrow().types
    if types.is_struct(kind):
        names = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        return "bytes" in names and _is_binary(names["bytes"]) and _is_text(names.get("path", names["bytes"]), True)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    types = import_pyarrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _is_text(kind: Any, or_bytes: bool = False) -> bool:
    types = import_pyarrow().types
    return bool(types.is_string(kind) or types.is_large_string(kind) or (or_bytes and _is_binary(kind)))


def _read_file(folder: Path, name: str) -> bytes:
    """Return the bytes of the file that a table names, relative to the table's folder. Raises ImageError."""
    if problem := url_problem(name):
        raise ImageError(problem)
    path = folder / name
    try:
        with check_regular(str(path)).open("rb") as file:
            data = file.read(MAX_VALUE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ImageError) else _unreadable(path, error) from None
    if len(data) > MAX_VALUE_BYTES:
        raise ImageError(f"{path} has more than {MAX_VALUE_BYTES >> 20} MiB, too much for an image.")
    return data


def check_footer(path: Path) -> None:
    """Raise ImageError for a file that is not Parquet, or whose description of itself is too long. Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or length + 12 > size:
        raise ImageError(f"{path} is not a Parquet table, or is cut off: it does not end as one does.")
    if length > MAX_FOOTER_BYTES:
        raise ImageError(f"{path} has a footer of {length:,} bytes; the limit is {MAX_FOOTER_BYTES >> 20} MiB.")


def import_pyarrow() -> Any:
    """Return pyarrow with its Parquet part. Raises OptionError if it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise OptionError(
            "Parquet tables need the package pyarrow, which is not installed; in a checkout of this project: "
            'pip install ".[parquet]"'
        ) from None
    return pyarrow


def _unreadable(path: Path, error: Exception) -> ImageError:
    reason = getattr(error, "strerror", None) or clip(shown(str(error), 200))
    return ImageError(f"{path} cannot be read: {reason}.")
