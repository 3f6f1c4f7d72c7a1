"""Write views of a folder of rows: each in a folder of its own, whole or not at all, the same bytes every time."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from florence2.bulk.lock import FolderLock
from florence2.bulk.sources import DATASET_MARK
from florence2.checkpoints.files import cannot_write, read_json, write_json
from florence2.dataset.captions import Captions, Metadata
from florence2.dataset.coco import Coco, CocoCaptions, CocoResults
from florence2.dataset.images import place_below
from florence2.dataset.index import ImageRows, RowIndex, open_index
from florence2.dataset.selection import choose_tasks
from florence2.dataset.splits import choose_split
from florence2.dataset.summary import DatasetReport, Failures, summarize
from florence2.dataset.tables import Csv, Parquet
from florence2.dataset.views import DEFAULT_SETTINGS, WRONG_VALUES, View, ViewSettings
from florence2.dataset.webdataset import WebDataset
from florence2.dataset.yolo import Yolo, YoloQuads, YoloSegments
from florence2.errors import ConfigError, Florence2Error, OptionError, OutputError

VIEWS: Mapping[str, type[View]] = {
    "coco": Coco,
    "coco-results": CocoResults,
    "coco-captions": CocoCaptions,
    "yolo": Yolo,
    "yolo-seg": YoloSegments,
    "yolo-obb": YoloQuads,
    "captions": Captions,
    "metadata": Metadata,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "csv": Csv,
}
"""The views by their names."""
REPORT = "report.json"
_SHOWN_EVERY = 256  # images


def write_views(
    source: Path,
    views: Sequence[str],
    out: Path,
    *,
    tasks: Sequence[str] = (),
    settings: ViewSettings = DEFAULT_SETTINGS,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> DatasetReport:
    """Write views of the rows in an output folder.

    Args:
        source: An output folder of `florence2 run` or `florence2 label`.
        views: Names of `VIEWS`.
        out: The folder for the views; each gets a folder of its own name, and replaces one that was written before.
        tasks: The tasks whose rows to show; empty where each view has only one to choose from.
        settings: How views are written.
        progress: Called with the number of images written so far and their total.

    Returns:
        The report, which `report.json` of `out` holds too, and sentences about what a user must know.

    Raises:
        OptionError: The folder has no results, a view has no rows or several tasks to choose from, the settings do not
            fit the rows, or a folder in the way was not written by this function. Nothing is changed.
        OutputError: A file cannot be written; views that were there before stay.
        OSError: The results cannot be read.
    """
    with open_index(source) as index:
        chosen = {name: choose_tasks(index.tasks, name, VIEWS[name].kinds, tasks, source) for name in views}
        with _out_folder(out):
            earlier = _read_report(out)
            _check_ours(out, views, earlier)
            with _drafts(out, views, settings) as drafts:
                reading = _Pass(index, chosen, settings, progress)
                reading.write(drafts)
                summary = summarize(source, index, reading.failures, settings, chosen, drafts)
                # first, because a view that it does not name would count as a foreign folder
                write_json(out / REPORT, dict(sorted({**earlier, **summary.report}.items())))
                for name in views:
                    _swap(out, name)
    return summary


@contextmanager
def _out_folder(out: Path) -> Iterator[None]:
    """Make the folder and hold its lock; name it in errors of writing."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file; a dataset needs a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FolderLock(out):
            (out / DATASET_MARK).touch()
            yield
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(out, error.strerror or str(error)) from None


@contextmanager
def _drafts(out: Path, names: Sequence[str], settings: ViewSettings) -> Iterator[dict[str, View]]:
    """Yield the views, each writing into a folder that is removed if the block does not move it."""
    views: dict[str, View] = {}
    try:
        for name in names:
            draft = _draft(out, name)
            shutil.rmtree(draft, ignore_errors=True)  # of a call that was killed
            draft.mkdir()
            views[name] = VIEWS[name](draft, settings, out / name)
        yield views
    finally:
        for view in views.values():
            with suppress(OSError):  # what waits in its buffers has no room on a full disk
                view.close()
        for name in names:
            shutil.rmtree(_draft(out, name), ignore_errors=True)


def _draft(out: Path, name: str) -> Path:
    return out / f".{name}.part"


def _swap(out: Path, name: str) -> None:
    """Put a finished view in the place of an earlier one."""
    final, old = out / name, out / f".{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    _draft(out, name).rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _read_report(out: Path) -> dict[str, Any]:
    if not (out / REPORT).exists():
        return {}
    try:
        return read_json(out / REPORT, limit=1 << 30)
    except ConfigError:
        return {}


def _check_ours(out: Path, names: Sequence[str], report: Mapping[str, Any]) -> None:
    """Refuse to replace a folder that this command has not written."""
    for name in names:
        path = out / name
        if name not in report and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise OptionError(
                f"{path} exists and was not written by this command (it is not in {out / REPORT}); move it away, or "
                "choose another folder with --out."
            )


@dataclass
class _Pass:
    """The reading of all rows, once for all views."""

    index: RowIndex
    chosen: Mapping[str, Sequence[str]]
    settings: ViewSettings
    progress: Callable[[int, int], None]
    failures: Failures = field(default_factory=Failures)

    def write(self, views: Mapping[str, View]) -> None:
        """Bring every image to every view."""
        total = len(self.index.ids)
        for done, image in enumerate(self.index.images(), 1):
            if image.failed or image.damaged:
                self.failures.add(image)
            self._add(image, views)
            if not done % _SHOWN_EVERY or done == total:
                self.progress(done, total)

    def _add(self, image: ImageRows, views: Mapping[str, View]) -> None:
        split = choose_split(image.id, self.settings.split)
        if self.settings.images is not None:
            image = replace(image, place=place_below(self.settings.images, image.place, image.id))
        for name, view in views.items():
            part = image.of_tasks(self.chosen[name])
            if not part.rows and not (part.failed and view.with_failed):
                continue
            try:
                view.add(part, split)
            except Florence2Error:
                raise
            except WRONG_VALUES:  # a line that somebody has edited
                view.counts["damaged_rows"] += len(part.rows)
