"""COCO: files of detections, of results for COCOeval, and of captions."""

import json
import shutil
from pathlib import Path
from typing import IO, Any

from florence2.dataset.index import ImageRows
from florence2.dataset.regions import LabelledRegion, shoelace
from florence2.dataset.views import TEXTS, RegionView, View, ViewSettings, open_text, text_of

_INFO = {"description": "Labelled by Florence-2 (florence2 dataset)"}


class _Lists:
    """Two lists of JSON objects that grow at the same time, and the document that they become."""

    def __init__(self, path: Path):
        self.path = path
        self._parts = [path.with_suffix(f".{name}") for name in ("images", "annotations")]
        self._files: list[IO[str]] = [open_text(part) for part in self._parts]
        self._counts = [0, 0]

    def image(self, values: str) -> None:
        """Add a JSON object to the images."""
        self._add(0, values)

    def annotation(self, values: str) -> None:
        """Add a JSON object to the annotations."""
        self._add(1, values)

    def _add(self, which: int, values: str) -> None:
        self._files[which].write(f",\n{values}" if self._counts[which] else values)
        self._counts[which] += 1

    def finish(self, head: dict[str, Any]) -> None:
        """Write the document: the fields of `head`, then both lists."""
        self.close()
        with self.path.open("wb") as document:
            document.write(json.dumps(head, ensure_ascii=False)[:-1].encode("utf-8", "backslashreplace"))
            for part in self._parts:
                document.write(f',\n"{part.suffix[1:]}": [\n'.encode())
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, document, 1 << 20)
                document.write(b"\n]")
                part.unlink()
            document.write(b"}\n")

    def close(self) -> None:
        """Close the files of the lists."""
        for file in self._files:
            file.close()


class _ImageDocuments:
    """One document for each part of a split, in which images are listed."""

    def __init__(self, folder: Path, name: str, settings: ViewSettings):
        self._documents = {part: _Lists(folder / f"{name}{end}.json") for part, end in settings.endings.items()}

    def list_image(self, image: ImageRows, split: str) -> _Lists:
        """List an image; return the document for its annotations."""
        width, height = image.size
        document = self._documents[split]
        name = json.dumps(image.id, ensure_ascii=False)
        document.image(f'{{"id": {image.number}, "file_name": {name}, "width": {width}, "height": {height}}}')
        return document

    def finish(self, **head: Any) -> None:
        """Write the documents."""
        for document in self._documents.values():
            document.finish({"info": _INFO, "licenses": [], **head})

    def close(self) -> None:
        """Close the files."""
        for document in self._documents.values():
            document.close()


class Coco(RegionView):
    """Detections: `instances.json`, or `instances_train.json` and so on for the parts of a split.

    Images are listed even without regions. Their ids are their ranks among the ids of the folder, so that shards give
    the same ones; category ids begin at 1.
    """

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._documents = _ImageDocuments(folder, "instances", settings)

    def add(self, image: ImageRows, split: str) -> None:
        """List the image and its regions."""
        regions = self.regions(image)
        document = self._documents.list_image(image, split)
        self.counts["images"] += 1
        for category, region in regions:
            self.counts["annotations"] += 1
            document.annotation(_annotation(self.counts["annotations"], image.number, category + 1, region))

    def finish(self) -> dict[str, Any]:
        """Write the documents with all categories."""
        names = enumerate(self.classes.names, 1)
        categories = [{"id": number, "name": name, "supercategory": ""} for number, name in names]
        self._documents.finish(categories=categories)
        return super().finish()

    def close(self) -> None:
        """Close the documents."""
        self._documents.close()


def _annotation(number: int, image: int, category: int, region: LabelledRegion) -> str:
    x1, y1, x2, y2 = region.box
    width, height = x2 - x1, y2 - y1
    area = sum(map(shoelace, region.rings)) if region.rings else width * height
    more = "" if region.score is None else f', "score": {region.score!r}'
    more += "" if region.confidence is None else f', "confidence": {region.confidence!r}'
    more += f', "text": {json.dumps(region.label, ensure_ascii=False)}' if region.is_quad else ""
    return (
        f'{{"id": {number}, "image_id": {image}, "category_id": {category}, '
        f'"bbox": [{x1!r}, {y1!r}, {width!r}, {height!r}], "area": {area:.4f}, '
        f'"segmentation": {_rings(region.rings)}, "iscrowd": 0{more}}}'
    )


def _rings(rings: Any) -> str:
    return json.dumps([list(ring) for ring in rings]) if rings else "[]"


class CocoResults(RegionView):
    """A list of detections with scores, for COCOeval: `results.json`; image and category ids are those of `Coco`.

    The score is the confidence, else the reference's score, else 1.
    """

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._files = {part: open_text(folder / f"results{end}.json") for part, end in settings.endings.items()}
        self._begun: set[str] = set()

    def add(self, image: ImageRows, split: str) -> None:
        """List the regions of an image."""
        regions = self.regions(image)
        self.counts["images"] += 1
        for category, region in regions:
            self._files[split].write(",\n" if split in self._begun else "[\n")
            self._begun.add(split)
            self._files[split].write(self._result(image.number, category + 1, region))
            self.counts["annotations"] += 1

    def _result(self, image: int, category: int, region: LabelledRegion) -> str:
        x1, y1, x2, y2 = region.box
        score = next((value for value in (region.confidence, region.score) if value is not None), None)
        self.counts["without_score"] += score is None
        outline = f', "segmentation": {_rings(region.rings)}' if region.rings else ""
        return (
            f'{{"image_id": {image}, "category_id": {category}, "bbox": [{x1!r}, {y1!r}, {x2 - x1!r}, {y2 - y1!r}], '
            f'"score": {1.0 if score is None else score!r}{outline}}}'
        )

    def finish(self) -> dict[str, Any]:
        """Write the ends of the lists."""
        for split, file in self._files.items():
            file.write("\n]\n" if split in self._begun else "[]\n")
        self.close()
        return super().finish()

    def close(self) -> None:
        """Close the lists."""
        for file in self._files.values():
            file.close()


class CocoCaptions(View):
    """Captions: `captions.json`, or one document for each part of a split; every text of an image is one annotation."""

    kinds = TEXTS

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._documents = _ImageDocuments(folder, "captions", settings)

    def add(self, image: ImageRows, split: str) -> None:
        """List the image and its texts."""
        texts = [f"{self.settings.prefix}{text_of(row)}{self.settings.suffix}" for row in image.rows]
        document = self._documents.list_image(image, split)
        self.counts["images"] += 1
        for text in texts:
            self.counts["captions"] += 1
            values = {"id": self.counts["captions"], "image_id": image.number, "caption": text}
            document.annotation(json.dumps(values, ensure_ascii=False))

    def finish(self) -> dict[str, Any]:
        """Write the documents."""
        self._documents.finish()
        return super().finish()

    def close(self) -> None:
        """Close the documents."""
        self._documents.close()
