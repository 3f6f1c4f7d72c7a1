"""YOLO: a file of labels for each image, and the images, in the trees where Ultralytics looks for them.

`data.yaml` names the folders of images; the labels of `images/train/a/b.jpg` are in `labels/train/a/b.txt`. An empty
file is an image without objects. Coordinates are shares of the image's sides with six decimals.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from florence2.dataset.files import Files
from florence2.dataset.images import MISSING, ImageFiles
from florence2.dataset.index import ImageRows
from florence2.dataset.names import OutputNames
from florence2.dataset.regions import LabelledRegion, Numbers
from florence2.dataset.views import OUTLINES, QUADS, RegionView, ViewSettings, open_text
from florence2.errors import OptionError

_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # not allowed in YAML as they are
_SURROGATE = re.compile("[\ud800-\udfff]")


class Yolo(RegionView):
    """Boxes: class, centre and size; of quads and outlines, their extent."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        if settings.split and not {"train", "val"} <= settings.split.keys():
            raise OptionError("A YOLO dataset needs the parts train and val; name both in --split.")
        # Ultralytics finds the labels by replacing the last /images/ of a path
        self._names = OutputNames(reserved=("images",))
        self._files = Files()
        self._image_files = ImageFiles(settings.link)
        self._labels, self._images = f"{folder}/labels", f"{folder}/images"

    def add(self, image: ImageRows, split: str) -> None:
        """Write the labels of an image, and bring the image."""
        lines = self.lines(image)
        name = f"{split or 'train'}/{self._names(image.id)}"
        self._files.make(f"{self._labels}/{name}.txt", "".join(lines).encode())
        self.counts["images"] += 1
        self.counts["objects"] += len(lines)
        self.counts["background_images"] += not lines
        try:
            self._image_files.put(image.place, f"{self._images}/{name}")
        except FileNotFoundError:
            self.counts[MISSING] += 1

    def lines(self, image: ImageRows) -> list[str]:
        """Return the lines of an image, without those that are equal after rounding, which Ultralytics warns of."""
        width, height = image.size
        written: dict[str, None] = {}
        for number, region in self.regions(image):
            numbers = self.numbers(region, width, height)
            if not numbers:
                self.counts[self.lost] += 1
                continue
            line = f"{number}{' %.6f' * len(numbers) % (*numbers,)}\n"
            self.counts["duplicates"] += line in written
            written[line] = None
        return list(written)

    lost: ClassVar[str] = "too_small"
    """The count of regions without numbers."""

    def numbers(self, region: LabelledRegion, width: int, height: int) -> Sequence[float]:
        """Return the numbers of a region; none where the format cannot hold it."""
        x1, y1, x2, y2 = region.box
        across, down = (x2 - x1) / width, (y2 - y1) / height
        if across < 5e-7 or down < 5e-7:  # zero after rounding
            return ()
        return (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, across, down

    def finish(self) -> dict[str, Any]:
        """Bring the images of tables, and write `data.yaml`."""
        self.counts[MISSING] += self._image_files.finish()
        parts = list(self.settings.split) or ["train", "val"]
        for part in parts[:1] if not self.settings.split else parts:
            for tree in ("images", "labels"):
                (self.folder / tree / part).mkdir(parents=True, exist_ok=True)
        with open_text(self.folder / "data.yaml") as file:
            file.write(f"path: {quote_yaml(str(self.final.absolute()))}\n")
            file.writelines(f"{part}: images/{part if self.settings.split else 'train'}\n" for part in parts)
            file.write("names:\n")
            file.writelines(f"  {number}: {quote_yaml(name)}\n" for number, name in enumerate(self.classes.names))
        self.counts["renamed"] = self._names.renamed
        return super().finish()


class YoloSegments(Yolo):
    """Outlines: class and points. Several rings of an object are joined at their nearest points."""

    kinds = OUTLINES
    lost = "without_outline"

    def numbers(self, region: LabelledRegion, width: int, height: int) -> Sequence[float]:
        """Return the points of the outline; none for a box."""
        points = join_rings(region.rings)
        return [value for x, y in points for value in (x / width, y / height)]


class YoloQuads(Yolo):
    """Oriented boxes: class and the four corners of a quad."""

    kinds = QUADS
    lost = "not_a_quad"

    def numbers(self, region: LabelledRegion, width: int, height: int) -> Sequence[float]:
        """Return the corners."""
        if not region.is_quad or not region.rings:
            return ()
        return [value / (height if i % 2 else width) for i, value in enumerate(region.rings[0])]


def join_rings(rings: Iterable[Numbers]) -> list[tuple[float, float]]:
    """Return one closed path through all rings: each next one is entered and left at its nearest point."""
    path: list[tuple[float, float]] = []
    for ring in rings:
        points = list(zip(ring[0::2], ring[1::2], strict=True))
        if not path:
            path = points
            continue
        pairs = ((i, j) for i in range(len(path)) for j in range(len(points)))
        i, j = min(pairs, key=lambda pair: _distance(path[pair[0]], points[pair[1]]))
        path = [*path[: i + 1], *points[j:], *points[: j + 1], *path[i:]]
    return path


def _distance(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def quote_yaml(text: str) -> str:
    """Return a text as a quoted scalar of YAML."""
    quoted = json.dumps(_SURROGATE.sub("\ufffd", text), ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)
