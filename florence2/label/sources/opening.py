"""The entry point: arguments of a command line -> images, iterable any number of times."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeAlias

from florence2.bulk.sources import Source, no_image, walk_folder
from florence2.errors import ImageError, OptionError
from florence2.inputs.files import read_data_url, short_name, url_problem
from florence2.inputs.tasks import TASKS, Task
from florence2.label.sources.item import Ids, Item, error_item, safe_stem

PassedOver: TypeAlias = Callable[[Path], None]


def open_sources(
    arguments: Sequence[str],
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    output: Path | None = None,
    passed_over: PassedOver = lambda _: None,
    shard: tuple[int, int] | None = None,
    known: Mapping[str, Task] = TASKS,
) -> Iterable[Item]:
    """Return the images that the arguments of a command line name.

    Nothing but names is read before the images are taken, and no list of them is held. Every iteration starts from the
    beginning and yields the same, as long as the files stay the same.

    Args:
        arguments: Files, folders and data URLs. A folder stands for all files in and below it that have an image's
            ending, in alphabetical order.
        image_column: The column of Parquet tables that holds the images. None takes the only one that can.
        id_column: The column of Parquet tables that holds the ids. None numbers the rows.
        output: The output folder of the run. Files in it are not taken, except where an argument names them.
        passed_over: Called with each file or link in a folder that is not taken, unless its name begins with a dot;
            in the first iteration only.
        shard: (i, n) takes the i-th of n parts, 1 <= i <= n: of files and lists each n-th image, of tars and tables
            each n-th file. A single tar is split by its images, a single table by its row groups.
        known: The tasks of the model, for questions in JSON Lines.

    Returns:
        The images. The bytes of one that is inside another file are read by `Source.content`.

    Raises:
        ImageError: An argument is empty, a URL to fetch or stdin, or a folder holds no image.
        OptionError: `shard` is not between 1 and n.
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise OptionError(f"Shard {shard[0]}/{shard[1]} does not exist; give i/n with i from 1 to n, such as 3/16.")
    root = _common_root(arguments)
    parts = [_open(argument, root, output) for argument in arguments]
    return Sources(parts, passed_over, shard)


@dataclass(frozen=True)
class Argument:
    """The images of one argument: a function that yields them, given where to report files that are passed over."""

    items: Callable[[PassedOver], Iterator[Item]]


class Sources:
    """The images of all arguments; each iteration starts from the beginning."""

    def __init__(self, parts: Sequence[Argument], passed_over: PassedOver, shard: tuple[int, int] | None):
        self._parts, self._passed_over = parts, passed_over
        self._index, self._shards = (0, 1) if shard is None else (shard[0] - 1, shard[1])

    def __iter__(self) -> Iterator[Item]:
        passed_over, self._passed_over = self._passed_over, lambda _: None
        ids, numbers = Ids(), count()
        for part in self._parts:
            for item in part.items(passed_over):
                distinct = ids.distinct(item)  # before the choice of the shard, which must not change ids
                if next(numbers) % self._shards == self._index:
                    yield distinct


def _open(argument: str, root: str, output: Path | None) -> Argument:
    if not argument:
        raise ImageError('The name of an image is empty (""); give a file or a folder.')
    if argument == "-":
        raise ImageError(
            "Images to label are not read from stdin, because a resumed run reads them again; give a file or a folder."
        )
    if argument[:5].lower() == "data:":
        source = Source(short_name(argument, 40), read_data_url(argument).getvalue(), "data", "data")
        return Argument(lambda _: iter([Item(source)]))
    if problem := url_problem(argument):
        raise ImageError(problem)
    if os.path.isdir(argument):  # noqa: PTH112  Path.is_dir raises for a name that is too long
        return _open_folder(Path(argument), _relative(argument, root), output)
    return Argument(lambda _: iter([file_item(Path(argument), _relative(argument, root))]))


def file_item(path: Path, id: str) -> Item:
    """Return the item of an image in a file of its own."""
    return Item(Source(str(path), path, safe_stem(os.path.splitext(id)[0]), id))  # noqa: PTH122  an id is not a path


def _open_folder(folder: Path, prefix: str, output: Path | None) -> Argument:
    """Return the images of a folder. Raises ImageError if it holds none."""
    others: list[Path] = []
    for entry in walk_folder(folder, output):
        if entry.is_image:
            break
        if entry.error is not None:
            raise ImageError(entry.error)
        others.append(entry.path)
    else:
        raise no_image(folder, others)
    start = len(str(folder / "x")) - 1  # where the path below the folder begins

    def items(passed_over: PassedOver) -> Iterator[Item]:
        for entry in walk_folder(folder, output):
            name = str(entry.path)
            id = prefix + name[start:].replace(os.sep, "/")
            if entry.error is not None:
                yield error_item(id, str(entry.path.absolute()), entry.error)
            elif entry.is_image:
                yield file_item(entry.path, id)
            else:
                passed_over(entry.path)

    return Argument(items)


def _common_root(arguments: Iterable[str]) -> str:
    """Return the deepest folder that all paths have in common, relative to which ids are stated."""
    paths = [argument for argument in arguments if argument[:5].lower() != "data:" and url_problem(argument) is None]
    folders = {_root(path) for path in paths}
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # on two drives of Windows
        return ""


def _root(path: str) -> str:
    whole = os.path.abspath(path)  # noqa: PTH100  without ".." in it
    return whole if os.path.isdir(whole) else os.path.dirname(whole)  # noqa: PTH112, PTH120


def _relative(path: str, root: str) -> str:
    """Return a path below the root in the form of an id; a folder's ends in a slash, unless it is the root."""
    whole = os.path.abspath(path)  # noqa: PTH100
    below = os.path.relpath(whole, root) if root else whole
    slash = "/" if os.path.isdir(whole) else ""  # noqa: PTH112
    return "" if below == "." else below.replace(os.sep, "/") + slash
