"""The entry point: arguments of a command line -> images, iterable any number of times."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeAlias

from florence2.bulk.sources import PassedOver, Source, no_image, walk_folder
from florence2.errors import ImageError, OptionError
from florence2.inputs.files import check_regular, read_data_url, short_name, url_problem
from florence2.inputs.formats import image_suffixes
from florence2.inputs.tasks import TASKS, Task
from florence2.label.sources.item import Ids, Item, error_item, file_id, file_item, with_distinct_id
from florence2.label.sources.lists import read_json_lines, read_list
from florence2.label.sources.patterns import expand_braces, has_wildcards, match_wildcards
from florence2.label.sources.tables import Columns, check_table, read_table
from florence2.label.sources.tars import read_tar

PassOver: TypeAlias = Callable[[Path], None]
"""A function that is called with a file that is not taken."""
Shard: TypeAlias = tuple[int, int]
"""(index, n): each n-th image, from the one with this index, which counts from 0."""
Named: TypeAlias = tuple[str, str]
"""A path, or a data URL, and how it is read (see `_kind`)."""
_KINDS = {".txt": "list", ".jsonl": "lines", ".ndjson": "lines", ".tar": "tar", ".parquet": "table"}
_CONTAINERS = {suffix for suffix, kind in _KINDS.items() if kind in ("tar", "table")}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_sources(
    arguments: Sequence[str],
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    output: Path | None = None,
    passed_over: PassOver = lambda _: None,
    shard: tuple[int, int] | None = None,
    known: Mapping[str, Task] = TASKS,
) -> "Sources":
    """Return the images that the arguments of a command line name.

    Little more than names is read before the images are taken, and no list of the images is held. Every iteration
    starts from the beginning and yields the same, as long as the files stay the same.

    Args:
        arguments: Each is one of these:

            - a file, or a data URL: one image;
            - a folder: all files in and below it that have an image's ending, in alphabetical order;
            - a list, `.txt`: a path a line, relative to the list;
            - JSON Lines, `.jsonl`: {"image", "task", "text" or "box", "id"} a line (see `lists.read_json_lines`);
            - a WebDataset tar, `.tar`: its members with an image's ending;
            - a Parquet table, `.parquet`: each row;
            - a pattern of any of these: `{00000..00069}.tar`, `photos/**/*.jpg`. All paths that match are held.
        image_column: The column of the tables that holds the images, as bytes, paths or both; None takes the only one
            that can. In tars the extension of the members to take, such as jpg or left.jpg, several with ";" between.
        id_column: The column of the tables that holds the ids. None numbers the rows from 0.
        output: The output folder of the run. Files in it are not taken, except where an argument names them.
        passed_over: Called with each file or link in a folder or pattern that is not taken, unless its name begins
            with a dot; in the first iteration only.
        shard: (i, n) takes the i-th of n parts, 1 <= i <= n: of files and lists each n-th image, of tars and tables
            each n-th file. A single tar is split by its images, a single table by its row groups.
        known: The tasks of the model, for questions in JSON Lines.

    Returns:
        The images; iterate over it. The id of an image is the one that its list or table states; otherwise its path
        below the folder that all arguments have in common, for an image in a tar followed by its WebDataset key, in a
        table by the row. A single tar's ids are the keys alone. Ids that repeat get numbers.

    Raises:
        ImageError: An argument is empty, a URL to fetch, stdin, or a list, tar or table that does not exist; a folder
            holds no image, or a pattern matches nothing.
        OptionError: `shard` is not between 1 and n, or a table is named and pyarrow is not installed.
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise OptionError(f"Shard {shard[0]}/{shard[1]} does not exist; give i/n with i from 1 to n, such as 3/16.")
    paths, others = _expand(arguments)
    part = (0, 1) if shard is None else (shard[0] - 1, shard[1])
    named = [(path, _kind(path)) for path in paths]
    opening = _Opening(named, output, Columns(image_column, id_column), part, known)
    return Sources(opening.open_all(named), others, passed_over, part)


@dataclass(frozen=True)
class Argument:
    """The images of one argument.

    Attributes:
        items: Yields them, given where to report files that are passed over.
        shared: The part of them that a shard takes: each n-th "image", or those of each n-th "file"; "chosen" has been
            cut to the shard already.
        packed: Whether they are in a tar or a table, which must be read to find them.
    """

    items: Callable[[PassOver], Iterator[Item]]
    shared: Literal["image", "file", "chosen"] = "image"
    packed: bool = False


class Sources:
    """The images of all arguments; each iteration starts from the beginning."""

    def __init__(self, parts: Sequence[Argument], others: Sequence[Path], passed_over: PassOver, shard: Shard):
        self._parts, self._others, self._passed_over, self._shard = parts, others, passed_over, shard

    @property
    def are_listed(self) -> bool:
        """Whether counting them costs little: none is in a tar or a table."""
        return not any(part.packed for part in self._parts)

    def __iter__(self) -> Iterator[Item]:
        passed_over, self._passed_over = self._passed_over, lambda _: None
        for path in self._others:
            passed_over(path)
        index, shards = self._shard
        ids, images, files = Ids(), count(), count()
        for part in self._parts:
            if part.shared == "file" and next(files) % shards != index:
                continue
            for item in part.items(passed_over):
                distinct = with_distinct_id(item, ids)  # before the choice of the shard, which must not change ids
                if part.shared != "image" or next(images) % shards == index:
                    yield distinct


def _expand(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the paths that arguments stand for, and the files that match a pattern but are not read."""
    paths: list[str] = []
    others: list[Path] = []
    for argument in arguments:
        if argument[:5].lower() == "data:" or os.path.exists(argument):  # noqa: PTH110  raises for names that are too long
            paths.append(argument)
            continue
        for path in expand_braces(argument):
            if not has_wildcards(path) or url_problem(path) is not None:
                paths.append(path)
                continue
            taken = {*image_suffixes(), *_CONTAINERS, _suffix(path)}  # of lists only those that the pattern asks for
            for match in match_wildcards(path):
                if os.path.isdir(match) or _suffix(match) in taken:  # noqa: PTH112
                    paths.append(match)
                else:
                    others.append(Path(match))
    return paths, others


def _check_columns(columns: Columns, named: Sequence[Named]) -> None:
    """Refuse columns where nothing has such, and check those of the first table."""
    kinds = {kind for _, kind in named}
    if columns.image is not None and not kinds & {"tar", "table"}:
        raise OptionError("An image column is that of a .parquet table, or an extension in a .tar; name such a file.")
    if columns.id is not None and "table" not in kinds:
        raise OptionError("An id column is that of a .parquet table; name one, or leave it out.")
    for path, kind in named:
        if kind == "table":
            _check_file(Path(path))
            check_table(Path(path), columns)
            return


class _Opening:
    """Opens arguments that share a root, below which ids are stated."""

    def __init__(
        self, named: Sequence[Named], output: Path | None, columns: Columns, shard: Shard, known: Mapping[str, Task]
    ):
        _check_columns(columns, named)
        self._root, self._alone = _common_root(named), len(named) == 1
        self._several = sum(kind in ("tar", "table") for _, kind in named) > 1
        self._output, self._columns, self._shard, self._known = output, columns, shard, known

    def open_all(self, named: Sequence[Named]) -> list[Argument]:
        """Return the images of all paths. Image files that follow each other are one argument, to save memory."""
        arguments: list[Argument] = []
        for kind, run in groupby(named, key=itemgetter(1)):
            paths = [path for path, _ in run]
            if kind == "image":
                arguments.append(self._open_images(paths))
            elif kind == "folder":
                arguments += [self._open_folder(Path(path)) for path in paths]
            elif kind == "data":
                arguments += map(_open_data_url, paths)
            else:
                arguments += [self._open_file(Path(path), kind) for path in paths]
        return arguments

    def _open_images(self, paths: Sequence[str]) -> Argument:
        for path in paths:
            _check_name(path)
        return Argument(lambda _: (file_item(Path(path), file_id(path, self._root)) for path in paths))

    def _open_file(self, path: Path, kind: str) -> Argument:
        """Return the images of a list, a tar or a table."""
        _check_file(path)
        prefix = "" if self._alone else file_id(str(path.with_suffix("")), self._root) + "/"
        if kind == "tar":
            extensions = () if self._columns.image is None else tuple(self._columns.image.split(";"))
            return Argument(lambda _: read_tar(path, prefix, extensions), "file" if self._several else "image", True)
        if kind == "table":
            part = (0, 1) if self._several else self._shard
            shared: Literal["file", "chosen"] = "file" if self._several else "chosen"
            return Argument(lambda _: read_table(path, self._columns, prefix, part), shared, True)
        if kind == "list":
            return Argument(lambda _: _until_error(path, read_list(path, self._root)))
        return Argument(lambda _: _until_error(path, read_json_lines(path, self._root, self._known)))

    def _open_folder(self, folder: Path) -> Argument:
        """Return the images of a folder. Raises ImageError if it holds none."""
        _check_holds_image(folder, self._output)
        start = len(str(folder / "x")) - 1  # where the path below the folder begins
        below = file_id(str(folder), self._root)
        prefix = "" if below == "." else f"{below}/"

        def items(passed_over: PassOver) -> Iterator[Item]:
            for entry in walk_folder(folder, self._output):
                id = prefix + str(entry.path)[start:].replace(os.sep, "/")
                if entry.error is not None:
                    yield error_item(id, str(entry.path.absolute()), entry.error)
                elif entry.is_image:
                    yield file_item(entry.path, id)
                else:
                    passed_over(entry.path)

        return Argument(items)


def _until_error(path: Path, items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items of a list, and one that says why the list cannot be read further, if so."""
    try:
        yield from items
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}."
        yield error_item(str(path), str(path.absolute()), problem)


def _open_data_url(url: str) -> Argument:
    source = Source(short_name(url, 40), read_data_url(url).getvalue(), "data", "data")
    return Argument(lambda _: iter([Item(source)]))


def _kind(path: str) -> str:
    """Return how a path is read: as "data", a "folder", an "image", or one of `_KINDS`."""
    if path[:5].lower() == "data:":
        return "data"
    if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
        return "folder"
    return _KINDS.get(_suffix(path), "image")


def _check_name(argument: str) -> None:
    """Raise ImageError for an argument that is not a path."""
    if argument == "-":
        raise ImageError(
            "Images to label are not read from stdin, because a resumed run reads them again; give a file or a folder."
        )
    if problem := url_problem(argument):
        raise ImageError(problem)
    if argument.lower().endswith(_PACKED):
        raise ImageError(f"{short_name(argument)} is compressed; unpack it to a .tar first, in which images are found.")


def _check_file(path: Path) -> None:
    """Raise ImageError for a list, tar or table that does not exist or is not a file."""
    _check_name(str(path))
    if not os.path.exists(path):  # noqa: PTH110
        raise ImageError(f"{short_name(str(path))} does not exist.")
    check_regular(str(path))


def _check_holds_image(folder: Path, output: Path | None) -> None:
    """Raise ImageError for a folder without an image. It looks no further than to the first."""
    others = PassedOver()
    for entry in walk_folder(folder, output):
        if entry.is_image:
            return
        if entry.error is not None:
            raise ImageError(entry.error)
        others(entry.path)
    raise no_image(folder, others)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122


def _common_root(named: Sequence[Named]) -> str:
    """Return the deepest folder that all paths have in common; an empty text if there is none."""
    folders = {_folder_of(path, kind) for path, kind in named if kind != "data"}
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # on two drives of Windows
        return ""


def _folder_of(path: str, kind: str) -> str:
    whole = os.path.abspath(path)  # noqa: PTH100  without ".." in it
    return whole if kind == "folder" else os.path.dirname(whole)  # noqa: PTH120
