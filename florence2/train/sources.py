"""A file of training data -> samples: JSON Lines, COCO detections, COCO captions."""

from collections.abc import Sequence
from pathlib import Path

from florence2.train.coco import read_coco
from florence2.train.data import Sample
from florence2.train.entries import DataError, Entry, Problems
from florence2.train.pictures import Pictures
from florence2.train.rows import read_rows

MAX_BYTES = 1 << 30


def read_samples(
    path: Path, images: Path | None = None, questions_per_picture: int = 4, tasks: Sequence[str] = ()
) -> list[Sample]:
    """Read a `.jsonl` file (see `rows.py`), a COCO `.json` file (see `coco.py`), or the JSON Lines of a folder.

    In a folder that is `train.jsonl`, or the one `.jsonl` there is. Pictures are named relative to `images`, or to
    the file. Questions about the same picture share a sample, at most `questions_per_picture` of them, in the file's
    order. `tasks` chooses what to ask of a COCO file. Pictures are not decoded: `check_samples` does that.
    Raises DataError for a file larger than 1 GiB, and one error for all that is wrong inside, the first 20 in words.
    """
    if questions_per_picture < 1:
        raise DataError(f"{questions_per_picture} questions for each picture leave nothing to train on; ask 1 or more.")
    path = _find_file(path)
    pictures, problems = Pictures(path.parent if images is None else images), Problems(path)
    if path.suffix.lower() == ".json":
        entries = read_coco(path, pictures, problems, tasks)
    elif tasks:
        raise DataError(f"The lines of {path} say themselves what they ask; tasks are chosen for COCO files only.")
    else:
        entries = read_rows(path, pictures, problems)
    problems.check()
    if not entries:
        raise DataError(f"{path} holds not one question; there is nothing to train on.")
    return _group(entries, questions_per_picture)


def _find_file(path: Path) -> Path:
    """The file meant by `path`, of a kind and size that can be read."""
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if path / "train.jsonl" in found:
            found = [path / "train.jsonl"]
        if len(found) != 1:
            raise DataError(f"The folder {path} has {len(found)} .jsonl files and no train.jsonl; name the one meant.")
        path = found[0]
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise DataError(f"{path} is no training data; give JSON Lines (.jsonl), a COCO file (.json), or a folder.")
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is no regular file; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes, above the limit of {MAX_BYTES:,}; split it.")
    return path


def _group(entries: Sequence[Entry], most: int) -> list[Sample]:
    """Entries of the same picture -> samples, in the order in which the pictures come first."""
    by_picture: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_picture.setdefault(entry.image, []).append(entry)
    return [_sample(some[i : i + most]) for some in by_picture.values() for i in range(0, len(some), most)]


def _sample(entries: Sequence[Entry]) -> Sample:
    pairs = tuple((entry.prefix, entry.suffix) for entry in entries)
    places = ", ".join(dict.fromkeys(entry.place for entry in entries))
    return Sample(entries[0].image, pairs, f"{entries[0].image.name} ({places})")
