"""Read samples from a file of training data: JSON Lines, COCO detections or COCO captions."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from florence2.inputs.tasks import TASKS, Task
from florence2.train.coco import read_coco
from florence2.train.entries import DataError, Entry, Problems
from florence2.train.images import ImageFolder
from florence2.train.rows import leading_tokens, read_rows
from florence2.train.samples import Sample

MAX_BYTES = 1 << 30
_RESEMBLES = 0.85  # of difflib, which gives <ODD> and <OD> 0.89, <MIXED_CAPTION> and <DETAILED_CAPTION> 0.77


def read_samples(
    path: Path,
    images: Path | None = None,
    questions_per_image: int = 4,
    tasks: Sequence[str] = (),
    known: Mapping[str, Task] = TASKS,
) -> list[Sample]:
    """Read samples from a file or folder. Images are not decoded; `check_samples` does that.

    Args:
        path: A `.jsonl` file (see `rows.py`), a COCO `.json` file (see `coco.py`), or a folder with `train.jsonl` or
            a single `.jsonl` file.
        images: The folder that image names are relative to; the file's own by default.
        questions_per_image: The most questions that a sample has. Questions about one image share samples, in the
            file's order.
        tasks: What to ask with a COCO file.
        known: The tasks of the model by token, `f.processor.tasks`.

    Raises:
        DataError: The file cannot be used or is larger than 1 GiB; or one error for all problems inside, with the
            first 20.
    """
    if questions_per_image < 1:
        raise DataError(f"questions_per_image is {questions_per_image}; it must be at least 1.")
    path = _find_file(path)
    folder, problems = ImageFolder(path.parent if images is None else images), Problems(path)
    if path.suffix.lower() == ".json":
        entries = read_coco(path, folder, problems, tasks)
    elif tasks:
        raise DataError(f"{path} names its own tasks in each line; tasks can be chosen for COCO files only.")
    else:
        entries = read_rows(path, folder, problems, known)
    problems.check()
    if not entries:
        raise DataError(f"{path} has no questions; there is nothing to train on.")
    return _group(entries, questions_per_image)


def find_new_tasks(paths: Sequence[Path], known: Mapping[str, Task]) -> list[str]:
    """Return the tokens that begin prompts of JSON Lines and that no task of `known` has, in the order of the lines.

    A fine-tune brings its tasks in its data. A token that resembles a known one is left out: it is probably misspelt,
    and `read_samples` refuses it. Raises DataError as `read_samples` for a file that cannot be used.
    """
    tokens: dict[str, None] = {}
    for file in map(_find_file, paths):
        if file.suffix.lower() == ".jsonl":
            tokens |= dict.fromkeys(leading_tokens(file))
    names = [token.lower() for token in known]
    return [
        token
        for token in tokens
        if token not in known and not difflib.get_close_matches(token.lower(), names, 1, _RESEMBLES)
    ]


def _find_file(path: Path) -> Path:
    """Return the file that `path` means; raise DataError unless its kind and size can be read."""
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if path / "train.jsonl" in files:
            files = [path / "train.jsonl"]
        if len(files) != 1:
            raise DataError(f"The folder {path} has {len(files)} .jsonl files and no train.jsonl; name one of them.")
        path = files[0]
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise DataError(f"{path} is not training data; give JSON Lines (.jsonl), a COCO file (.json), or a folder.")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a regular file; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes, above the limit of {MAX_BYTES:,}; split it.")
    return path


def _group(entries: Sequence[Entry], most: int) -> list[Sample]:
    """Group entries of one image into samples, in the order of each image's first entry."""
    by_image: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_image.setdefault(entry.image, []).append(entry)
    return [_sample(some[i : i + most]) for some in by_image.values() for i in range(0, len(some), most)]


def _sample(entries: Sequence[Entry]) -> Sample:
    pairs = tuple((entry.prefix, entry.suffix) for entry in entries)
    places = ", ".join(dict.fromkeys(entry.place for entry in entries))
    return Sample(entries[0].image, pairs, f"{entries[0].image.name} ({places})")
