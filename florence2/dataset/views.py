"""What every view is: it takes one image after another and leaves files in a folder of its own."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

from florence2.dataset.classes import Classes, Unmatched
from florence2.dataset.index import CASCADE, ImageRows, size_of
from florence2.dataset.regions import OBJECT_CLASS, TEXT_CLASS, LabelledRegion, RegionReader

TEXTS = frozenset(("text", CASCADE))
QUADS = frozenset(("quads",))
OUTLINES = frozenset(("quads", "polygons", "boxes_or_polygons", CASCADE))
REGIONS = OUTLINES | {"boxes", "proposals", "phrases"}
EVERYTHING = REGIONS | TEXTS
WRONG_VALUES = (AttributeError, LookupError, TypeError, ValueError, OverflowError)
"""The errors that values raise which are not those of a row; those of pyarrow are among them."""


@dataclass(frozen=True)
class ViewSettings:
    """How views are written.

    Attributes:
        classes: The names of the classes, in the order of their numbers; None takes every label as it comes.
        unmatched: What becomes of a label that fits none of `classes`.
        split: The shares of the parts of the dataset; empty for one whole.
        min_confidence: The least confidence of a region; None keeps all.
        link: How images come into the folder: "symlink", "hard" or "copy".
        prefix: A text before every caption.
        suffix: A text after every caption.
        ext: The ending of the files of captions.
        beside: Write captions next to the images, not into the output folder.
        overwrite: Replace files of captions that exist next to the images.
        with_images: Put the images into the tars too.
        images: A folder in which files that are not at their places are looked for by their ids; None for none.
    """

    classes: Sequence[str] | None = None
    unmatched: Unmatched = "keep"
    split: Mapping[str, float] = field(default_factory=dict)
    min_confidence: float | None = None
    link: str = "symlink"
    prefix: str = ""
    suffix: str = ""
    ext: str = ".txt"
    beside: bool = False
    overwrite: bool = False
    with_images: bool = False
    images: Path | None = None

    @property
    def endings(self) -> dict[str, str]:
        """The end of a file's name for each part of the split: {"train": "_train", ...}, or {"": ""} for one whole."""
        return {part: f"_{part}" for part in self.split} or {"": ""}


DEFAULT_SETTINGS = ViewSettings()


class View(ABC):
    """One format. Subclasses write the images that `add` brings, and close their files in `finish`.

    Attributes:
        kinds: The kinds of rows that the view can show.
        with_failed: Whether images come whose rows all failed.
    """

    kinds: ClassVar[Collection[str]] = EVERYTHING
    with_failed: ClassVar[bool] = False

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        """Write into `folder`, which becomes `final` when all is written."""
        self.folder, self.settings, self.final = folder, settings, final
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def add(self, image: ImageRows, split: str) -> None:
        """Take the next image, whose rows are those of the tasks that the view shows.

        Raises:
            KeyError, TypeError, ValueError, IndexError: The rows hold values that are not those of answers; nothing of
                the image is written.
            OptionError: The settings do not fit the rows.
        """

    def finish(self) -> dict[str, Any]:
        """Write the rest; return the view's part of the report."""
        return {"counts": _sorted(self.counts)}

    def close(self) -> None:  # noqa: B027  a view that holds no file open has nothing to close
        """Close all files, also those of a view that is given up."""


class RegionView(View):
    """A view of regions with numbered classes."""

    kinds = REGIONS

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self.reader = RegionReader(settings.min_confidence)
        self.classes = Classes(settings.classes, settings.unmatched)

    def regions(self, image: ImageRows) -> list[tuple[int, LabelledRegion]]:
        """Return the regions of an image with the numbers of their classes, without those to leave out."""
        regions: list[LabelledRegion] = []
        size = image.size
        for row in image.rows:
            if size_of(row) == size:
                regions += self.reader.read(row, size)
            else:
                self.counts["outdated_rows"] += 1
        numbered = [(self.classes.number(self.label(region)), region) for region in regions]
        return [(number, region) for number, region in numbered if number is not None]

    def label(self, region: LabelledRegion) -> str:
        """Return the label to match: the text of a quad counts only where classes are given."""
        if region.is_quad and self.settings.classes is None:
            return TEXT_CLASS
        return region.label or OBJECT_CLASS

    def finish(self) -> dict[str, Any]:
        """Return the counts of the view, of its regions, and of its classes."""
        return {"counts": _sorted(self.counts + self.reader.counts), "classes": self.classes.report()}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def open_text(path: Path) -> IO[str]:
    """Open a new file of UTF-8 text, whose lines end in the same way everywhere; lone surrogates become escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")


def text_of(row: Mapping[str, Any]) -> str:
    """Return the text of an answered row; of a cascade, its caption. Raises TypeError where it has none."""
    text = row.get("caption", row)["text"]
    if not isinstance(text, str):
        raise TypeError("text must be a text.")
    return text.strip()
