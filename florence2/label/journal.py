"""The output folder of `florence2 label`: rows are appended as they are known, and a later run sees which are finished.

Nothing is rewritten at the start, whatever ended the run before. A run that ends well puts the rows in input order.
"""

import os
import re
import time
from array import array
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from florence2.bulk.earlier import DAMAGED_NAME, check_settings
from florence2.bulk.journal import check_folder, unwritable
from florence2.bulk.lock import FolderLock
from florence2.bulk.row_file import RowFile, to_line
from florence2.bulk.rows import Row
from florence2.checkpoints.files import write_json
from florence2.errors import OptionError
from florence2.label.compaction import Others, compact, count_others
from florence2.label.index import Finished, Index
from florence2.label.keys import By

_RESULTS = re.compile(r"results(\.\d+-of-(\d+))?\.jsonl")
_SYNC_SECONDS = 30.0


class Journal:
    """`results.jsonl`, or one shard of it, and `settings.json` in a folder, locked until it is closed.

    Attributes:
        results: The file of rows.
        by: What identifies an image among the finished ones.
        finished: The questions that earlier runs have answered.
        notes: Sentences for the user about the state of the folder.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, shard: tuple[int, int] | None = None, by: By = "place"
    ):
        """Open or make the folder.

        Args:
            folder: The folder.
            settings: What all answers depend on. A folder without answers takes any.
            shard: (i, n) for the i-th of n parts, each with a file of rows of its own.
            by: Whether an image that has another place but the same id is the same.

        Raises:
            OptionError: `folder` is a file or cannot be written, another run writes the same rows, the folder is
                divided otherwise, or it holds answers made with other `settings`.
        """
        self.folder, self.by = folder, by
        part = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
        self.results = folder / f"results{part}.jsonl"
        check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder, part)
        except OSError as error:
            raise unwritable(folder, error) from None
        with ExitStack() as closing:
            closing.callback(self._lock.release)
            try:
                self._open(settings, shard, closing)
            except OSError as error:
                raise unwritable(folder, error) from None
            self._closing = closing.pop_all()

    def _open(self, settings: Mapping[str, Any], shard: tuple[int, int] | None, closing: ExitStack) -> None:
        self.notes = [self._lock.note] if self._lock.note else []
        self._refuse_other_shards(shard)
        self._remove_drafts()
        self._index = Index(self.results, self.by)
        closing.callback(self._index.close)
        records = self._index.records()
        self.finished = Finished(self._index, records)
        file = self.folder / "settings.json"
        if len(self.finished) or shard is not None:  # another shard may be about to write its first answer
            check_settings(file, settings)
        if not (len(self.finished) and file.exists()):
            write_json(file, dict(settings))
        if damaged := int((records["key"] == 0).sum()):
            self.notes.append(
                f"{self.results} has {damaged} damaged line{'' if damaged == 1 else 's'}, which will be moved to "
                f"{DAMAGED_NAME} next to it; their questions count as not answered."
            )
        self._file = RowFile(self.results)
        closing.callback(lambda: self._file.close())  # compaction opens another one
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OptionError):  # the rows are written; only a loss of power could still cost some
            self.sync()
        self._closing.close()

    def __call__(self, row: Row) -> None:
        """Write one row. Raises OptionError where it cannot be written; no part of it stays in the file."""
        values = row.to_dict(file=True)
        line = to_line(values)
        self._file.append(line)
        self._index.add(line, values, self._file.size)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all rows are on the disk. Raises OptionError where the disk cannot take them."""
        try:
            self._file.sync()
        except OSError as error:
            raise unwritable(self.results, error) from None
        self._synced = time.monotonic()

    def compact(self, order: "array[int]", keep_failed: bool = True) -> Others:
        """Put the rows in the order of these keys, one for each, if they are not so already (see `compaction`).

        Rows with other keys stay after them; without `keep_failed`, errors among them do not. Returns how many there
        were. Raises OSError where that cannot be written; the rows then stay as they are.
        """
        self.sync()
        keys = np.frombuffer(order, np.uint64) if order else np.empty(0, np.uint64)
        self._index.refresh()
        others = count_others(self._index, keys)
        if compact(self._index, keys, keep_failed):
            self._file.close()
            self._file = RowFile(self.results)
        return others

    def _remove_drafts(self) -> None:
        """Delete the drafts of a run that was killed while it put its rows in order."""
        names = (self.results.name, f".{self.results.stem}.index")
        for draft in (path for name in names for path in self.folder.glob(f".{name}.{'[0-9a-f]' * 12}")):
            draft.unlink()

    def _refuse_other_shards(self, shard: tuple[int, int] | None) -> None:
        """Raise OptionError where the folder holds rows that are divided otherwise."""
        wanted = None if shard is None else str(shard[1])
        for name in sorted(os.listdir(self.folder)):  # noqa: PTH208  names alone are enough
            match = _RESULTS.fullmatch(name)
            if match and match[2] != wanted and (self.folder / name).stat().st_size:
                divided = "not divided into shards" if match[2] is None else f"divided into {match[2]} shards"
                raise OptionError(
                    f"{self.folder} holds the rows of a run that was {divided} ({name}); resume it as it was, or "
                    "choose another folder."
                )
