"""The check `views` of `python -m benchmarks label`: what each view of `florence2 dataset` takes for many rows.

Every view is written by a process of its own, next to a plain loop that makes as many files and links and nothing else:
the floor that the file system sets. Ids are all different; the images themselves are few, and named by many rows.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

IMAGES = 1000
"""Files that the rows name as their images."""
FILES = 1000
"""Ids, and so files of labels, in a folder."""
ANSWERS = 10_000
"""Answers that differ; the rows repeat them."""
_LABELS = [f"{kind} {number}" for kind in ("letter", "digit", "shape", "word") for number in range(20)]
_VIEWS = {
    "<OD>": ("coco", "coco-results", "csv", "parquet", "webdataset", "yolo"),
    "<OCR_WITH_REGION>": ("yolo-seg", "yolo-obb"),
    "<CAPTION>": ("coco-captions", "captions", "metadata"),
}


def check_views(folder: Path, rows: int, chosen: Sequence[str]) -> Iterator[str]:
    """Yield a line for each view of `rows` rows, or for each chosen one, and for each plain loop."""
    images = _make_images(folder / "images")
    for name in ("files", "links"):
        yield f"a plain loop that makes {rows:,} {name}: {_describe(measure(_LOOP, folder / 'loop', name, rows))}"
        shutil.rmtree(folder / "loop")
    for task, views in _VIEWS.items():
        if wanted := [view for view in views if not chosen or view in chosen]:
            source = write_rows(folder / "rows", task, rows, images)
        for view in wanted:
            words = [source, "--to", view, "--out", folder / "out"]
            yield f"{view}, {rows:,} rows of {task}: {_describe(measure(_DATASET, *words))}"
            shutil.rmtree(folder / "out")


def write_rows(folder: Path, task: str, count: int, images: Sequence[Path]) -> Path:
    """Write rows as `florence2 label` does, with 0 to 6 regions or words each, in the order of their ids."""
    folder.mkdir(exist_ok=True)
    draw, answer = random.Random(0), _ANSWERS[task]
    rest = {"calibrated": True, "sequence_score": -0.5, "finish_reason": "stop", "file": {"bytes": 1, "modified_ns": 1}}
    answers = [json.dumps(answer(draw, draw.randrange(7)) | rest)[1:] for _ in range(min(count, ANSWERS))]
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            place = str(images[number % len(images)])
            head = {"image": place, "place": place, "id": f"{number // FILES:04}/{number:07}.jpg", "task": task}
            file.write(f"{json.dumps(head)[:-1]}, {answers[number % len(answers)]}\n")
    return folder


def _boxes(draw: random.Random, count: int) -> dict[str, Any]:
    boxes, text = [], ""
    for _ in range(count):
        label, x, y, side = draw.choice(_LABELS), draw.randrange(500), draw.randrange(500), draw.randrange(1, 400)
        text += f"{label}<loc_{x}><loc_{y}><loc_{x + side}><loc_{y + side}>"
        box = [(x + 0.5) * 0.64, (y + 0.5) * 0.48, (x + side + 0.5) * 0.64, (y + side + 0.5) * 0.48]
        boxes.append({"xyxy": box, "label": label, "score": draw.random(), "confidence": draw.random()})
    return _answer("boxes", text) | {"boxes": boxes, "score": draw.random()}


def _quads(draw: random.Random, count: int) -> dict[str, Any]:
    quads, text = [], ""
    for _ in range(count):
        label, x, y, side = draw.choice(_LABELS), draw.randrange(500), draw.randrange(500), draw.randrange(1, 400)
        bins = [x, y, x + side, y, x + side, y + side, x, y + side]
        text += label + "".join(f"<loc_{value}>" for value in bins)
        points = [(value + 0.5) * (0.48 if i % 2 else 0.64) for i, value in enumerate(bins)]
        quads.append({"xyxyxyxy": points, "label": label, "score": draw.random(), "confidence": draw.random()})
    return _answer("quads", text) | {"quads": quads, "score": draw.random()}


def _caption(draw: random.Random, count: int) -> dict[str, Any]:
    return _answer("text", ", ".join(f"a blue {draw.choice(_LABELS)}" for _ in range(count + 1)))


def _answer(kind: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "text": text, "raw_text": f"</s><s>{text}</s>", "image_size": [640, 480]}


_ANSWERS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "<OD>": _boxes,
    "<OCR_WITH_REGION>": _quads,
    "<CAPTION>": _caption,
}


def _make_images(folder: Path) -> list[Path]:
    folder.mkdir()
    images = [folder / f"{number:04}.jpg" for number in range(IMAGES)]
    for image in images:
        image.write_bytes(b"\0")
    return images


# ---- processes -----------------------------------------------------------------------------------------------------

_DATASET = """
from florence2.dataset.command import main
code = main(sys.argv[1:])
"""
_LOOP = f"""
import os
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
data, code = b"0 0.500000 0.500000 0.250000 0.250000\\n" * 3, 0
for number in range(count):
    if number % {FILES} == 0:
        part = f"{{folder}}/{{number // {FILES}:04}}"
        os.makedirs(part)
    if name == "links":
        os.symlink(f"{{folder}}/images/0000.jpg", f"{{part}}/{{number:07}}.jpg")
    else:
        file = os.open(f"{{part}}/{{number:07}}.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, data)
        os.close(file)
"""
_MEASURE = """
import re, sys, time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
started = time.perf_counter()
"""
_REPORT = """
both = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
user, system = sum(each.ru_utime for each in both), sum(each.ru_stime for each in both)
peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
assert code == 0
print(time.perf_counter() - started, user, system, peak)
"""


def measure(code: str, *words: object) -> list[float]:
    """Return the seconds, the processor time outside and inside the system, and the peak of memory in megabytes."""
    command = [sys.executable, "-c", _MEASURE + code + _REPORT, *map(str, words)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return [float(number) for number in lines.split()]


def _describe(measured: Sequence[float]) -> str:
    seconds, user, system, peak = measured
    return f"{seconds:.1f} s ({user:.1f} s of processor time, and {system:.1f} s in the system), {peak:.0f} MB"
