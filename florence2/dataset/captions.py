"""Captions: a file of text for each image, as trainers of image generators read them, or one `metadata.jsonl`."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import written_whole
from florence2.dataset.files import Files
from florence2.dataset.images import MISSING, ImageFiles, find_image
from florence2.dataset.index import ImageRows
from florence2.dataset.names import OutputNames, split_suffix
from florence2.dataset.views import TEXTS, View, ViewSettings, open_text, text_of
from florence2.errors import OptionError, shown
from florence2.inputs.formats import image_suffixes


class OneTextView(View):
    """A view with room for one text an image."""

    kinds = TEXTS

    def caption(self, image: ImageRows) -> str:
        """Return the text of an image with prefix and suffix. Raises OptionError for an image with several."""
        texts = [text_of(row) for row in image.rows]
        if len(texts) > 1:
            raise OptionError(
                f"The image {shown(image.id)} has {len(texts)} texts, and this view holds one an image. Choose one "
                "task with --task, or take a view that holds all: coco-captions, csv, webdataset or parquet."
            )
        return f"{self.settings.prefix}{texts[0]}{self.settings.suffix}"


class Captions(OneTextView):
    """`a.txt` for `a.jpg`: in the view's folder, in the tree of the ids, or next to the images."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._names, self._files = OutputNames(), Files()
        self._beside: set[str] = set()

    def add(self, image: ImageRows, split: str) -> None:
        """Write the caption of an image."""
        text = self.caption(image)
        self.counts["images"] += 1
        if self.settings.beside:
            self._write_beside(image, text)
            return
        # the ending is added to the name, in which further dots may stand
        path = f"{self.folder}/{split or '.'}/{self._names(image.id)}{self.settings.ext}"
        self._files.make(path, text.encode("utf-8", "backslashreplace"))
        self.counts["written"] += 1

    def _write_beside(self, image: ImageRows, text: str) -> None:
        """Write next to an image that is there; an existing file stays unless it may be replaced."""
        place = image.place
        if not isinstance(find_image(place), str):
            self.counts[MISSING] += 1
            return
        target = f"{split_suffix(place)[0]}{self.settings.ext}"
        if target in self._beside:
            self.counts["shared_names"] += 1
        elif os.path.lexists(target) and not self.settings.overwrite:
            self.counts["left"] += 1
        else:
            with written_whole(Path(target)) as draft:
                draft.write_bytes(text.encode("utf-8", "replace"))
            self.counts["written"] += 1
        self._beside.add(target)

    def finish(self) -> dict[str, Any]:
        """Return the counts."""
        self.counts["renamed"] = self._names.renamed
        return super().finish()


class Metadata(OneTextView):
    """`metadata.jsonl` next to the images, as `datasets` reads them; a folder for each part of a split."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._names = OutputNames()
        self._images = ImageFiles(settings.link)
        self._files = {part: open_text(folder / part / "metadata.jsonl") for part in settings.split or [""]}

    def add(self, image: ImageRows, split: str) -> None:
        """Write the line of an image, and bring the image; an image that is not there gets no line."""
        text, name = self.caption(image), self._names(image.id)
        try:
            self._images.put(
                image.place, f"{self.folder}/{split or '.'}/{name}", partial(self._write, split, name, text)
            )
        except FileNotFoundError:
            self.counts[MISSING] += 1

    def _write(self, split: str, name: str, text: str, ending: str) -> None:
        """Write the line of an image that is there."""
        self._files[split].write(json.dumps({"file_name": name + ending, "text": text}, ensure_ascii=False) + "\n")
        self.counts["images"] += 1

    def finish(self) -> dict[str, Any]:
        """Bring the images of tables, close the files, and return the counts."""
        self.counts[MISSING] += self._images.finish()
        self.close()
        self.counts["renamed"] = self._names.renamed
        return super().finish()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def check_ending(ext: str) -> None:
    """Raise OptionError for an ending that a file of captions must not have."""
    if not ext or split_suffix(f"a{ext}") != ("a", ext) or ext.lower() in image_suffixes():
        raise OptionError(
            f"--ext is {shown(ext)}; give a dot and up to 8 letters or digits, but not an image's ending: .caption."
        )
