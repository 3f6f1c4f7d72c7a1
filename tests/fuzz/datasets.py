"""Rows of a results file with spoilt values and spoilt lines, written as every kind of dataset."""

import json
import os
from pathlib import Path
from random import Random

from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import VIEWS, write_views
from tests.dataset.rows import boxes, caption, cascade, failed, polygons, quads
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_ROWS = (
    boxes("a.jpg", ("cat", 1, 2, 3, 4), ("dogs", -5, 7, 300, 20)),
    quads("b/c.png", ("STOP", [1, 1, 50, 1, 50, 20, 1, 20])),
    polygons("d", ("cup", [[0, 0, 9, 0, 9, 9], [20, 20, 30, 20, 30, 30]]), input="a cup"),
    caption("a.jpg", "a cat"),
    cascade("e.f.jpg"),
    failed("g.jpg"),
)

Case = tuple[str, bytes, bool]


def draw(random: Random) -> Case:
    lines = []
    for _ in range(random.randint(1, 6)):
        row = random.choice(_ROWS)
        line = values.to_json(random, values.change_json(random, row)) if random.random() < 0.8 else _line(row)
        lines.append(values.change_bytes(random, line) if random.random() < 0.1 else line)
    return random.choice(sorted(VIEWS)), b"\n".join(lines) + b"\n", random.random() < 0.5


def _line(row: object) -> bytes:
    return json.dumps(row).encode()


def check(case: Case, place: Path) -> None:
    name, lines, settled = case
    file = material.put(place / "rows" / "results.jsonl", lines)
    before = sorted(place.rglob("*"))
    split = {"train": 0.5, "val": 0.5}
    classes = None if name in ("captions", "metadata") else ["cat", "dog"]
    settings = ViewSettings(split=split, classes=classes, with_images=True) if settled else ViewSettings()
    try:
        report = write_views(file.parent, [name], place / "out", settings=settings)
        again = write_views(file.parent, [name], place / "out", settings=settings)
        expect(report == again, "a second call counts the same")
        expect((place / "out" / name).is_dir(), "the view has its folder")
    finally:
        written = {path for path in place.rglob("*") if path not in before}
        inside = place / "out"
        outside = [path for path in written if path != inside and inside not in path.parents]
        expect(not outside, f"{outside} was written outside the folder")
        links = [path for path in written if path.is_symlink() and not os.path.isfile(path)]  # noqa: PTH113
        expect(not links, f"{links} lead nowhere")
