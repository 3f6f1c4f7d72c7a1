"""Sources of images to label: tars, Parquet tables, JSON Lines and lists with spoilt bytes."""

import io
import itertools
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from florence2.errors import Florence2Error, ImageError
from florence2.label.sources.opening import open_sources
from tests.fuzz import material
from tests.fuzz.worker import expect

_LINES = b"""\
{"image": "a.png", "task": "od", "id": "x"}
{"image": "a.png", "task": "region_to_ocr", "box": [1, 2, 3.5, 4e1]}
{"image": "b/\xc3\xa4.png", "task": "caption_to_phrase_grounding", "text": ["a dog", "a cat"], "id": 7}
{"image": "c.png"}
"""
_MOST = 2000  # items that a few spoilt bytes may stand for


@cache
def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    material.drawing(number).save(buffer, format="PNG")
    return buffer.getvalue()


def _tar(random: Random) -> bytes:
    buffer = io.BytesIO()
    form = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in ("a.png", "b.json", f"deep/{'c' * 90}.png", "\xfc.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(_png(1))
            tar.addfile(info, io.BytesIO(_png(1)))
    return buffer.getvalue()


def _parquet(random: Random) -> bytes:
    buffer = io.BytesIO()
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": _png(number), "path": None} for number in range(5)]
    table = pyarrow.table({"image": pyarrow.array([*values, None], struct), "id": list("abcdef")})
    compression = random.choice(("none", "snappy", "zstd"))
    pyarrow.parquet.write_table(table, buffer, row_group_size=3, compression=compression)
    return buffer.getvalue()


_MAKERS: dict[str, Callable[[Random], bytes]] = {
    "tar": _tar,
    "parquet": _parquet,
    "jsonl": lambda _: _LINES,
    "txt": lambda _: b"a.png\nb/c.png\n\n/d.png\n",
}


def draw(random: Random) -> tuple[str, bytes]:
    kind = random.choice(sorted(_MAKERS))
    data = bytearray(_MAKERS[kind](random))
    for _ in range(random.choice((0, 1, 1, 2, 5, 20))):
        at = random.randrange(len(data))
        if kind == "parquet" and random.random() < 0.6:  # its description of itself
            at = max(0, len(data) - random.randrange(1, 900))
        size = random.choice((1, 4, 100, 512))
        spoilt = random.choice((b"", random.randbytes(size), bytes(size), b"\xff" * size, b"[" * size, b"9" * size))
        data[at : at + random.choice((0, len(spoilt), size))] = spoilt
        data += b"" if data else b"x"
    return kind, bytes(data)


def check(case: tuple[str, bytes], place: Path) -> None:
    kind, data = case
    file = material.put(place / f"x.{kind}", data)
    id_column = "id" if kind == "parquet" else None
    before, problems, asked = sorted(place.rglob("*")), [], set()
    for item in itertools.islice(open_sources([str(file)], id_column=id_column), _MOST):
        key = (item.source.id, item.questions and tuple(str(question.to_dict()) for question in item.questions))
        expect(item.source.id and key not in asked, f"{key} comes twice")
        asked.add(key)
        try:
            expect(isinstance(item.source.content(), bytes | Path), "an image is bytes or a path")
        except Florence2Error as error:
            problems.append(str(error))
    expect(len(asked) < _MOST, "a few bytes stand for endless images")
    expect(all(len(problem) < 2000 for problem in problems), "a sentence quotes a whole file")
    expect(sorted(place.rglob("*")) == before, "a file was written")
    if problems:
        raise ImageError(problems[0])
