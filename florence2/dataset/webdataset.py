"""WebDataset: tars of samples with the rows of their images as JSON, and the images too if wanted.

The rows of each input tar go into one tar of the same name, with the same keys in the same order; those of other images
go into tars of `SAMPLES_OF_TAR` in the order of the ids. Nothing in them depends on the time or on who writes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

from florence2.dataset.images import MISSING, find_image, split_place
from florence2.dataset.index import ImageRows
from florence2.dataset.names import OutputNames, split_suffix
from florence2.dataset.tar_writing import TarWriter
from florence2.dataset.views import TEXTS, View, ViewSettings, text_of
from florence2.errors import ImageError
from florence2.label.sources.tars import KEY, TarImage, read_tar

SAMPLES_OF_TAR = 10_000
_encode = json.JSONEncoder(ensure_ascii=False).encode
_LOCAL = ("image", "place", "file", "drawing", "drawing_error")
"""Values of a row that say where its files were."""


class _Sample(NamedTuple):
    """What a tar gets for an image: its key, a JSON list of its rows, how many texts they have, and a single one."""

    key: str
    place: str
    rows: bytes
    texts: int
    text: bytes


class _Waiting(NamedTuple):
    """The rows of an image of a tar, written to the spool until the place of its sample is known; then its text."""

    place: str
    offset: int
    rows: int
    texts: int
    text: int


class WebDataset(View):
    """`KEY.florence2.json` with a list of the sample's rows, `KEY.txt` with its text if it has one, and the images."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._parts = {part: _Part(folder / part) for part in settings.split or [""]}
        self._tars: dict[tuple[str, str], list[_Waiting]] = {}
        self._spool_path = folder / ".rows"
        self._spool: IO[bytes] = self._spool_path.open("w+b")
        self._end = 0

    def add(self, image: ImageRows, split: str) -> None:
        """Write the rows of an image; those of one in a tar wait until all of that tar are known."""
        rows = [{name: value for name, value in row.items() if name not in _LOCAL} for row in image.rows]
        texts = _texts(rows)
        text = texts[0].encode("utf-8", "replace") if len(texts) == 1 else b""
        data = _encode(rows).encode("utf-8", "backslashreplace")
        if path := split_place(image.place)[0]:
            waiting = self._tars.setdefault((split, path), [])
            waiting.append(_Waiting(image.place, self._end, len(data), len(texts), len(text)))
            self._end += self._spool.write(data + text)
        else:
            part = self._parts[split]
            found = find_image(image.place) if self.settings.with_images else None
            sample = _Sample(part.keys(image.id), image.place, data, len(texts), text)
            self._write_sample(part.next_tar(), [(sample, found)])
        self.counts["images"] += 1

    def finish(self) -> dict[str, Any]:
        """Write the tars of images that came from tars, and end the others."""
        for part in self._parts.values():
            part.finish()
            self.counts["tars"] += part.count
        for (split, path), waiting in sorted(self._tars.items()):
            with closing(self._parts[split].new_tar(Path(path).stem, path)) as tar:
                samples = self._samples_of_tar(Path(path), waiting)
                for _, images in groupby(samples, key=lambda sample: sample[0].key):
                    self._write_sample(tar, list(images))
                tar.finish()
            self.counts["tars"] += 1
        self.close()
        self._spool_path.unlink()
        return super().finish()

    def close(self) -> None:
        """Close all files."""
        self._spool.close()
        for part in self._parts.values():
            part.close()

    def _samples_of_tar(self, path: Path, waiting: Sequence[_Waiting]) -> "Iterator[_Found]":
        """Yield the images of an input tar in its order, then those that are no longer in it."""
        left: dict[str, list[_Waiting]] = {}  # an image that was labelled under two ids has two
        for each in waiting:
            left.setdefault(each.place, []).append(each)
        for item in read_tar(path) if path.is_file() else ():
            image = item.source.data
            if isinstance(image, TarImage):
                yield from ((self._read(each), image) for each in left.pop(image.place, ()))
        for some in left.values():
            yield from ((self._read(each), None) for each in some)

    def _read(self, waiting: _Waiting) -> _Sample:
        self._spool.seek(waiting.offset)
        rows, text = self._spool.read(waiting.rows), self._spool.read(waiting.text)
        return _Sample(_key(waiting.place), waiting.place, rows, waiting.texts, text)

    def _write_sample(self, tar: TarWriter, images: "Sequence[_Found]") -> None:
        """Write the images of one key, which are one sample."""
        key = images[0][0].key
        if self.settings.with_images:
            for place, image in {sample.place: image for sample, image in images}.items():
                self._add_image(tar, key, place, image)
        tar.add(f"{key}.florence2.json", b"[%s]" % b", ".join(sample.rows[1:-1] for sample, _ in images))
        if sum(sample.texts for sample, _ in images) == 1:
            tar.add(f"{key}.txt", b"".join(sample.text for sample, _ in images))
        self.counts["samples"] += 1

    def _add_image(self, tar: TarWriter, key: str, place: str, image: str | TarImage | None) -> None:
        """Add an image, with the ending of its name; one that is not there is counted."""
        match = KEY.match(split_place(place)[1])
        ending = match[2] if match else split_suffix(place)[1][1:]
        try:
            content = b"" if image is None else Path(image).read_bytes() if isinstance(image, str) else image.read()
        except (ImageError, OSError):
            content = b""
        if content:
            tar.add(f"{key}.{ending or 'image'}", content)
        else:
            self.counts[MISSING] += 1


_Found = tuple[_Sample, str | TarImage | None]
"""The sample of an image, and the image, if it is wanted and there."""


class _Part:
    """One part of a split: the names of its tars, and the tars of its images that came from none, one after another.

    Attributes:
        keys: Gives each of these images its key.
        count: How many tars they fill.
    """

    def __init__(self, folder: Path):
        self.folder, self.keys, self._names = folder, OutputNames(dots=False), OutputNames()
        self.count = self._samples = 0
        self._tar: TarWriter | None = None

    def new_tar(self, name: str, path: str) -> TarWriter:
        """Begin a tar with this name, or one like it if an earlier one has it, made from this `path`."""
        return TarWriter(self.folder / f"{self._names(name, path)}.tar")

    def next_tar(self) -> TarWriter:
        """Return the tar of the next sample, which has room for `SAMPLES_OF_TAR`."""
        if self._tar is None or self._samples == SAMPLES_OF_TAR:
            self.finish()
            name = f"images-{self.count:05}"
            self._tar = self.new_tar(name, name)
            self.count, self._samples = self.count + 1, 0
        self._samples += 1
        return self._tar

    def finish(self) -> None:
        """Write the end of the last of these tars."""
        if self._tar is not None:
            self._tar.finish()
            self._tar = None

    def close(self) -> None:
        """Close the last of these tars as it is."""
        if self._tar is not None:
            self._tar.close()


def _key(place: str) -> str:
    """Return the key of an image in a tar; one that leads out of a folder is made harmless."""
    _, name = split_place(place)
    match = KEY.match(name)
    key = match[1] if match else name
    parts = key.split("/")
    safe = key.isprintable() and "\\" not in key and not {"", ".", ".."} & set(parts)
    return key if safe else OutputNames(dots=False)(key)


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [text_of(row) for row in rows if row.get("kind") in TEXTS or "caption" in row]
