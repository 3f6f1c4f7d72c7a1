"""An output folder: one run at a time writes it, each row at once, and a later run sees which are finished."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from florence2.bulk.earlier import change_lines, check_settings, leave_out, parse_row, read_earlier, tidy_up
from florence2.bulk.lock import FolderLock
from florence2.bulk.row_file import RowFile, to_line
from florence2.bulk.rows import Result, Row, has_changed, restore_result, row_key
from florence2.checkpoints.files import MAX_NAME_BYTES, clip_name, write_json, written_whole
from florence2.errors import ImageError, OptionError
from florence2.inputs.image import open_image


class Folder:
    """An output folder: `results.jsonl`, `settings.json`, and drawn images when `draw` is set.

    Attributes:
        earlier: The rows of earlier runs, counted.
        done: The keys of those that are finished. Failures, and answers about images that have changed, are written
            again.
        notes: Sentences for the user about the state of the folder.
    """

    def __init__(self, path: Path, draw: bool, settings: Mapping[str, Any], rows: Sequence[Row] | None = None):
        """Open or make the folder, and lock it until it is closed.

        Args:
            path: The folder.
            draw: Draw each answer that has regions.
            settings: What all answers depend on. A folder without answers takes any.
            rows: The rows that this run requests, without answers. Earlier failures among them are removed, and
                outdated answers once they are replaced; None removes all failures.

        Raises:
            OptionError: `path` is a file or cannot be written, another run writes to it, or it holds answers made with
                other `settings`: one file must not mix them.
        """
        self.path, self.draw = path, draw
        self.notes: list[str] = []
        self._requested = None if rows is None else {row.key: row for row in rows}
        check_folder(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            self._open(settings)
        except OSError as error:
            self._lock.release()
            raise unwritable(path, error) from None
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Tidy up after an earlier run, and open the file of rows."""
        self.notes += [self._lock.note] if self._lock.note else []
        self.results, file = self.path / "results.jsonl", self.path / "settings.json"
        self.earlier = read_earlier(self.results, self._requested)
        self.done = self.earlier.done
        answered = self.done or self.earlier.outdated
        if answered:  # without answers nothing can be mixed
            check_settings(file, settings)
        moved = tidy_up(self.results, self.earlier)
        self.notes += [moved] if moved else []
        self._replaced: list[int] = []  # outdated lines whose questions were answered again
        if changed := len(self.earlier.outdated):
            self.notes.append(
                "1 answer is about an image that has changed since, so it is computed again."
                if changed == 1
                else f"{changed} answers are about images that have changed since, so they are computed again."
            )
        if not (answered and file.exists()):
            write_json(file, dict(settings))
        self._file = RowFile(self.results)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # such as on a full disk: the next run leaves them out
            if self._replaced:
                leave_out(self.results, frozenset(self._replaced))
        self._lock.release()

    def __call__(self, row: Row) -> Row:
        """Write one row, and its drawing if it has regions to draw.

        Returns:
            The row; with `drawing_error` where the drawing could not be made.

        Raises:
            OptionError: The row cannot be written; no part of it stays in the file.
        """
        if self.draw and row.answer is not None and has_regions(row.answer):
            row = self._draw(row, row.answer)
        self._file.append(to_line(row.to_dict(file=True)))
        if row.answer is not None and row.key in self.earlier.outdated:
            self._replaced.append(self.earlier.outdated.pop(row.key))
        return row

    def draw_earlier(self, progress: Callable[[int, int], None] = lambda *_: None) -> list[Row]:
        """Draw the requested answers of earlier runs that have no drawing, from their rows and without the model.

        Args:
            progress: Called with the number of answers drawn so far and their total, after each.

        Returns:
            The rows whose answers could not be drawn, each with its `drawing_error`.

        Raises:
            OptionError: The rows cannot be written; all of them stay unchanged.
        """
        with self.results.open("rb") as lines:
            undrawn = [number for number, line in enumerate(lines) if self._undrawn(line) is not None]
        failed: list[Row] = []
        done = itertools.count(1)

        def change(line: bytes) -> bytes:
            row = self._undrawn(line)
            if row is None:
                return line
            drawn = row if row.answer is None else self._draw(row, row.answer)
            failed.extend([drawn] if drawn.drawing_error else [])
            progress(next(done), len(undrawn))
            return to_line(_with_drawing(parse_row(line) or {}, drawn))

        if undrawn:
            self._file.close()  # it is replaced
            try:
                change_lines(self.results, frozenset(undrawn), change)
            except OSError as error:
                raise unwritable(self.path, error) from None
            finally:
                self._file = RowFile(self.results)
        return failed

    def _undrawn(self, line: bytes) -> Row | None:
        """Return the requested row of a line if its answer has regions and its drawing is missing, otherwise None."""
        values = parse_row(line) or {"error": "damaged"}
        requested = (self._requested or {}).get(row_key(values))
        if requested is None or "error" in values or has_changed(values, requested.source):
            return None
        drawing = values.get("drawing")
        if isinstance(drawing, str) and os.path.isfile(self.path / drawing):  # noqa: PTH113  Path.is_file raises for NUL
            return None
        try:
            answer = restore_result(values)
        except (AttributeError, LookupError, TypeError, ValueError):
            reason = f"{self.results} holds a damaged answer, which cannot be drawn."
            return replace(requested, answer=None, drawing_error=reason)
        return replace(requested, answer=answer) if has_regions(answer) else None

    def _draw(self, row: Row, answer: Result) -> Row:
        """Draw the answer on its image; return the row with the new file's path inside the folder, or the error."""
        try:
            image = open_image(row.source.content())
            changed = row.version is not None and row.source.version() != row.version
            if changed or image.size != answer.image_size:
                raise ImageError(f"{row.source.name} has changed since it was read, so its answer was not drawn.")
            target = self._unused(Path(row.source.stem), row.question.alias)
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as draft:
                answer.draw(image).save(draft, format="PNG")
        except OSError as error:
            return replace(row, drawing_error=f"The drawing cannot be written: {error.strerror or error}.")
        except (ValueError, MemoryError) as error:  # a Florence2Error is a ValueError
            return replace(row, drawing_error=str(error) or type(error).__name__)
        return replace(row, drawing=str(target.relative_to(self.path)))

    def _unused(self, stem: Path, alias: str) -> Path:
        """Return a path for a drawing where no file exists yet."""
        names = (_drawing_name(stem.name, alias, count) for count in itertools.count(1))
        paths = (self.path / stem.parent / name for name in names)
        return next(path for path in paths if not path.exists())


def _with_drawing(values: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Return the values of a stored row with the drawing of `row`, or the error instead of it."""
    drawn = {"drawing": row.drawing, "drawing_error": row.drawing_error}
    kept = {key: value for key, value in values.items() if key not in drawn}
    return kept | {key: value for key, value in drawn.items() if value is not None}


def check_folder(path: Path) -> None:
    """Raise OptionError for a path that cannot be an output folder, because a file has its name."""
    if os.path.exists(path) and not path.is_dir():  # noqa: PTH110  Path.exists raises for a name that is too long
        raise OptionError(f"{path} is a file; answers need a folder.")


def has_regions(result: Result) -> bool:
    """Return whether a result has something to draw."""
    return bool(result.boxes or result.quads or result.polygons)


def _drawing_name(stem: str, alias: str, count: int) -> str:
    """Return a name that the file system takes; of a long one only the beginning stays, with a hash of the whole."""
    ending = f".{clip_name(alias, 80)}{'' if count == 1 else f'-{count}'}.png"
    if clip_name(stem + ending) == stem + ending:
        return stem + ending
    digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    ending = f"-{digest}{ending}"
    return clip_name(stem, MAX_NAME_BYTES - len(ending.encode())) + ending


def unwritable(path: Path, error: OSError) -> OptionError:
    """Return the error of an output folder that cannot be written."""
    return OptionError(f"{path} cannot be written: {error.strerror or error}. Choose another folder.")
