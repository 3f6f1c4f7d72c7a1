"""WebDataset: tars of samples with the rows of their images as JSON, and the images too if wanted.

The rows of each input tar go into one tar of the same name, with the same keys in the same order; those of other images
go into tars of `SAMPLES_OF_TAR` in the order of the ids. Nothing in them depends on the time or on who writes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from florence2.dataset.images import MISSING, find_image, split_place
from florence2.dataset.index import ImageRows
from florence2.dataset.names import OutputNames, split_suffix
from florence2.dataset.views import TEXTS, View, ViewSettings, text_of
from florence2.errors import ImageError
from florence2.label.sources.tars import KEY, TarImage, read_tar

SAMPLES_OF_TAR = 10_000
_LOCAL = ("image", "place", "file", "drawing", "drawing_error")
"""Values of a row that say where its files were."""


class _Waiting(NamedTuple):
    """The rows of an image, written to the spool until the place of its sample is known."""

    id: str
    place: str
    offset: int
    size: int
    texts: int


class WebDataset(View):
    """`KEY.florence2.json` with a list of the sample's rows, `KEY.txt` with its text if it has one, and the images."""

    def __init__(self, folder: Path, settings: ViewSettings, final: Path):
        super().__init__(folder, settings, final)
        self._tars: dict[tuple[str, str], list[_Waiting]] = {}
        self._names = OutputNames()
        self._spool_path = folder / ".rows"
        self._spool: IO[bytes] = self._spool_path.open("w+b")
        self._end = 0

    def add(self, image: ImageRows, split: str) -> None:
        """Keep the rows of an image until its tar is written."""
        rows = [{name: value for name, value in row.items() if name not in _LOCAL} for row in image.rows]
        texts = len(_texts(rows))
        data = json.dumps(rows, ensure_ascii=False).encode("utf-8", "backslashreplace")
        path, _ = split_place(image.place)
        waiting = self._tars.setdefault((split, path), [])
        waiting.append(_Waiting(image.id, image.place, self._end, len(data), texts))
        self._end += self._spool.write(data)
        self.counts["images"] += 1

    def finish(self) -> dict[str, Any]:
        """Write the tars."""
        for (split, path), waiting in sorted(self._tars.items()):
            if path:
                target = self.folder / split / f"{self._names(Path(path).stem, path)}.tar"
                self._write(target, self._samples_of_tar(Path(path), waiting))
            else:
                names = OutputNames(dots=False)
                samples = ((names(each.id), each, find_image(each.place)) for each in waiting)
                for number in count():
                    if not (some := list(islice(samples, SAMPLES_OF_TAR))):
                        break
                    self._write(self.folder / split / f"images-{number:05}.tar", some)
        self.close()
        self._spool_path.unlink()
        return super().finish()

    def close(self) -> None:
        """Close the file of waiting rows."""
        self._spool.close()

    def _samples_of_tar(self, path: Path, waiting: Sequence[_Waiting]) -> "Iterator[_Sample]":
        """Yield the images of an input tar in its order, then those that are no longer in it."""
        left: dict[str, list[_Waiting]] = {}  # an image that was labelled under two ids has two
        for each in waiting:
            left.setdefault(each.place, []).append(each)
        for item in read_tar(path) if path.is_file() else ():
            image = item.source.data
            if isinstance(image, TarImage):
                yield from ((_key(image.place), each, image) for each in left.pop(image.place, ()))
        for some in left.values():
            yield from ((_key(each.place), each, None) for each in some)

    def _write(self, target: Path, samples: "Iterable[_Sample]") -> None:
        """Write a tar; images of the same key that follow each other are one sample."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w", encoding="utf-8") as tar:
            for key, images in groupby(samples, key=lambda sample: sample[0]):
                self._write_sample(tar, key, list(images))
        self.counts["tars"] += 1

    def _write_sample(self, tar: tarfile.TarFile, key: str, images: "Sequence[_Sample]") -> None:
        parts = [self._read(each) for _, each, _ in images]
        if self.settings.with_images:
            for place, image in {each.place: image for _, each, image in images}.items():
                self._add_image(tar, key, place, image)
        _add(tar, f"{key}.florence2.json", b"[%s]" % b", ".join(part[1:-1] for part in parts))
        if sum(each.texts for _, each, _ in images) == 1:
            (text,) = (text for part in parts for text in _texts(json.loads(part)))
            _add(tar, f"{key}.txt", text.encode("utf-8", "replace"))
        self.counts["samples"] += 1

    def _read(self, waiting: _Waiting) -> bytes:
        self._spool.seek(waiting.offset)
        return self._spool.read(waiting.size)

    def _add_image(self, tar: tarfile.TarFile, key: str, place: str, image: Path | TarImage | None) -> None:
        """Add an image, with the ending of its name; one that is not there is counted."""
        match = KEY.match(split_place(place)[1])
        ending = match[2] if match else split_suffix(place)[1][1:]
        try:
            content = b"" if image is None else image.read_bytes() if isinstance(image, Path) else image.read()
        except (ImageError, OSError):
            content = b""
        if content:
            _add(tar, f"{key}.{ending or 'image'}", content)
        else:
            self.counts[MISSING] += 1


_Sample = tuple[str, _Waiting, Path | TarImage | None]
"""The key, the rows, and the image, if it is there."""


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


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file whose time and owner are always the same."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    # a name of a few letters needs no extended header, and looking for its need takes most of the time
    tar.format = tarfile.USTAR_FORMAT if name.isascii() and len(name) <= tarfile.LENGTH_NAME else tarfile.PAX_FORMAT
    tar.addfile(info, io.BytesIO(data))
