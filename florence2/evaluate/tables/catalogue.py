"""The tables: their splits, their files below the folder of the data, how large these are, and who publishes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from florence2.evaluate.tables.captions import read_coco_captions, read_karpathy, read_textcaps
from florence2.evaluate.tables.detection import read_instances
from florence2.evaluate.tables.entities import read_entities
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.expressions import read_expressions
from florence2.evaluate.tables.questions import read_textvqa, read_vizwiz, read_vqa

Family: TypeAlias = Literal["captions", "detection", "phrases", "expressions", "masks", "questions"]
Reader: TypeAlias = Callable[[Path], Iterator[BenchmarkExample[Any]]]


@dataclass(frozen=True)
class DataFile:
    """A file or folder below the folder of the data.

    Attributes:
        path: Its path there; a folder's ends in "/".
        megabytes: An estimate of its size when unpacked, in units of 10^6 bytes.
        origin: Where its owners publish it.
    """

    path: str
    megabytes: float
    origin: str


@dataclass(frozen=True)
class Split:
    """One part of a table: its files, and how to read them from the folder of the data."""

    files: Sequence[DataFile]
    read: Reader


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        family: What it measures, and so which metrics it has.
        splits: Its parts by their names; the first one is the default.
    """

    family: Family
    splits: Mapping[str, Split]


_COCO, _REFER = "cocodataset.org, Download", "github.com/lichengunc/refer, README"
_FLICKR, _TEXTVQA = "github.com/BryanPlummer/flickr30k_entities, annotations.zip", "textvqa.org/dataset"
_VQA, _VIZWIZ = "visualqa.org/download.html", "vizwiz.org/tasks-and-datasets/vqa"
_OPEN_IMAGES = DataFile("textvqa/train_images/", 6600, f"{_TEXTVQA}, train_val_images.zip")
_VAL2014, _TRAIN2014 = DataFile("coco/val2014/", 6600, _COCO), DataFile("coco/train2014/", 13500, _COCO)


def _karpathy(split: str) -> Split:
    file = DataFile(
        "coco/dataset_coco.json", 144, "cs.stanford.edu/people/karpathy/deepimagesent, caption_datasets.zip"
    )
    return Split([file, _VAL2014], lambda data: read_karpathy(data / file.path, data / "coco", split))


def _nocaps() -> Split:
    file = DataFile("nocaps/nocaps_val_4500_captions.json", 5, "nocaps.org/download")
    images = DataFile("nocaps/val/", 1500, "Open Images V4, validation; nocaps.org/download lists the images")
    return Split([file, images], lambda data: read_coco_captions(data / file.path, data / images.path))


def _textcaps() -> Split:
    file = DataFile("textvqa/TextCaps_0.1_val.json", 14, "textvqa.org/textcaps/dataset")
    return Split([file, _OPEN_IMAGES], lambda data: read_textcaps(data / file.path, data / _OPEN_IMAGES.path))


def _detection() -> Split:
    file = DataFile("coco/annotations/instances_val2017.json", 20, f"{_COCO}, annotations_trainval2017.zip")
    images = DataFile("coco/val2017/", 816, _COCO)
    return Split([file, images], lambda data: read_instances(data / file.path, data / images.path))


def _entities(split: str) -> Split:
    files = [DataFile(f"flickr30k/{name}", size, _FLICKR) for name, size in (("Sentences/", 20), ("Annotations/", 60))]
    files.append(DataFile(f"flickr30k/{split}.txt", 0.1, _FLICKR))
    images = DataFile("flickr30k/flickr30k-images/", 4400, "shannon.cs.illinois.edu/DenotationGraph, on request")
    return Split([*files, images], lambda data: read_entities(data / "flickr30k", data / images.path, split))


def _expressions(folder: str, owner: str, split: str, outlined: bool = False) -> Split:
    files = [DataFile(f"{folder}/refs({owner}).p", 50, _REFER), DataFile(f"{folder}/instances.json", 100, _REFER)]

    def read(data: Path) -> Iterator[BenchmarkExample[Any]]:
        return read_expressions(data / files[0].path, data / files[1].path, data / _TRAIN2014.path, split, outlined)

    return Split([*files, _TRAIN2014], read)


def _vqav2(split: str, year: str, answers: bool) -> Split:
    questions = DataFile(f"vqav2/v2_OpenEnded_mscoco_{split}{year}_questions.json", 25 if answers else 11, _VQA)
    annotations = DataFile(f"vqav2/v2_mscoco_{split}{year}_annotations.json", 190, _VQA)
    images = _VAL2014 if answers else DataFile("coco/test2015/", 13500, _COCO)

    def read(data: Path) -> Iterator[BenchmarkExample[Any]]:
        truth = data / annotations.path if answers else None
        name = f"COCO_{Path(images.path).name}_"
        return read_vqa(data / questions.path, truth, data / images.path, name)

    return Split([questions, *([annotations] if answers else []), images], read)


def _textvqa(split: str) -> Split:
    file = DataFile(f"textvqa/TextVQA_0.5.1_{split}.json", 16, _TEXTVQA)
    images = _OPEN_IMAGES if split == "val" else DataFile("textvqa/test_images/", 930, f"{_TEXTVQA}, test_images.zip")
    return Split([file, images], lambda data: read_textvqa(data / file.path, data / images.path))


def _vizwiz(split: str) -> Split:
    file = DataFile(f"vizwiz/{split}.json", 5 if split == "val" else 1, f"{_VIZWIZ}, Annotations.zip")
    images = DataFile(f"vizwiz/{split}/", 3000, f"{_VIZWIZ}, {split}.zip")
    return Split([file, images], lambda data: read_vizwiz(data / file.path, data / images.path))


def _refcoco(
    folder: str, owner: str = "unc", splits: Sequence[str] = ("val", "testA", "testB"), *, outlined: bool = False
) -> dict[str, Split]:
    return {split: _expressions(folder, owner, split, outlined) for split in splits}


TABLES: dict[str, Benchmark] = {
    "coco-caption": Benchmark("captions", {"test": _karpathy("test"), "val": _karpathy("val")}),
    "nocaps": Benchmark("captions", {"val": _nocaps()}),
    "textcaps": Benchmark("captions", {"val": _textcaps()}),
    "coco-detection": Benchmark("detection", {"val2017": _detection()}),
    "flickr30k": Benchmark("phrases", {"test": _entities("test"), "val": _entities("val")}),
    "refcoco": Benchmark("expressions", _refcoco("refcoco")),
    "refcoco+": Benchmark("expressions", _refcoco("refcoco+")),
    "refcocog": Benchmark("expressions", _refcoco("refcocog", "umd", ("val", "test"))),
    "refcoco-res": Benchmark("masks", _refcoco("refcoco", outlined=True)),
    "vqav2": Benchmark(
        "questions", {"val": _vqav2("val", "2014", True), "test-dev": _vqav2("test-dev", "2015", False)}
    ),
    "textvqa": Benchmark("questions", {"val": _textvqa("val"), "test": _textvqa("test")}),
    "vizwiz": Benchmark("questions", {"val": _vizwiz("val"), "test": _vizwiz("test")}),
}
"""The tables by the names that the command takes."""


def find_split(name: str) -> tuple[str, str, Benchmark, Split]:
    """Return a table's name, the split's, the table and the split that "TABLE" or "TABLE:SPLIT" means.

    Raises:
        TableError: Neither is known.
    """
    table_name, colon, split_name = name.partition(":")
    table = TABLES.get(table_name)
    if table is None:
        raise TableError(f"Unknown table {table_name[:60]!r}. Known tables: {', '.join(TABLES)}.")
    split_name = split_name if colon else next(iter(table.splits))
    if split_name not in table.splits:
        raise TableError(f"{table_name} has no split {split_name[:60]!r}. Its splits: {', '.join(table.splits)}.")
    return table_name, split_name, table, table.splits[split_name]


def read_table(name: str, data: Path) -> list[BenchmarkExample[Any]]:
    """Read the examples of a split.

    Args:
        name: "TABLE" for its default split, or "TABLE:SPLIT".
        data: The folder that holds the files of all tables (see `describe_files`).

    Raises:
        TableError: The split is unknown or empty, or a file is missing or does not have the form of its owners.
    """
    _, _, _, split = find_split(name)
    if not data.is_dir():
        raise TableError(f"{data} is not a folder; give the one that holds the files that --list names.")
    for file in split.files:
        if not (data / file.path).exists():
            raise TableError(f"{data / file.path} does not exist; {_origin(file)}.")
    examples = list(split.read(data))
    if not examples:
        raise TableError(f"The files of {name} below {data} hold no examples.")
    return examples


def _origin(file: DataFile) -> str:
    return f"its owners publish it ({_size(file)}) at {file.origin}"


def _size(file: DataFile) -> str:
    if file.megabytes >= 1000:
        return f"about {file.megabytes / 1000:.1f} GB"
    return f"about {file.megabytes:g} MB"


def describe_files(names: Sequence[str] = tuple(TABLES)) -> list[tuple[str, str, str, str]]:
    """Return table and split, path below the folder of the data, size and origin of each file of the tables."""
    return [
        (f"{name}:{split_name}", file.path, _size(file), file.origin)
        for name in names
        for split_name, split in TABLES[name].splits.items()
        for file in split.files
    ]
