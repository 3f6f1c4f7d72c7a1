"""The report of views: every count and every label that has no class, and the same in sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from florence2.dataset.images import MISSING
from florence2.dataset.index import FAILED, ImageRows, RowIndex
from florence2.dataset.views import DEFAULT_SETTINGS, View, ViewSettings
from florence2.errors import listing, shown

MAX_REPORTED_ERRORS = 1000
_NOT_COMPLETE = {"damaged_rows", MISSING, "shared_names"}
_WORDS = {  # of one and of several
    "outdated_rows": "{n} answer{s} {were} left out: the size of the image has changed since.",
    "damaged_rows": "{n} row{s} with damaged values {were} left out.",
    "clipped": "{n} region{s} {were} clipped to the image.",
    "swapped": "{n} box{es} had left and right, or top and bottom, in the wrong order; they were exchanged.",
    "degenerate": "{n} region{s} without area {were} left out.",
    "degenerate_rings": "{n} outline{s} without area {were} left out of objects with several.",
    "below_min_confidence": "{n} region{s} below --min-confidence {were} left out.",
    "too_small": "{n} region{s} too small for six decimals {were} left out.",
    "without_outline": "{n} region{s} without an outline {were} left out.",
    "not_a_quad": "{n} region{s} that {are} not a quadrilateral {were} left out.",
    "duplicates": "{n} region{s} equal to another after rounding {were} left out.",
    "without_score": "{n} region{s} without a score got 1.",
    MISSING: "{n} image{s} {were} not found at the place that the row names, and {are} missing from the dataset; "
    "--images DIR says where their folder is now.",
    "renamed": "{n} file{s} {are} not named after the id, which is taken or cannot be a file's name.",
    "left": "{n} file{s} of captions already existed and {were} kept; --overwrite replaces them.",
    "shared_names": "{n} caption{s} {were} not written: another image has the same file of captions.",
}


@dataclass
class Failures:
    """The failed rows and damaged lines, counted; the first failed rows are listed."""

    count: int = 0
    damaged: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, image: ImageRows) -> None:
        """Take the failed rows and damaged lines of an image."""
        self.count += len(image.failed)
        self.damaged += image.damaged
        for row in image.failed[: MAX_REPORTED_ERRORS - len(self.listed)]:
            self.listed.append({"id": image.id, "task": row["task"], "error": str(row["error"])})


@dataclass
class DatasetReport:
    """What was read and written.

    Attributes:
        report: The report of each view.
        notes: Sentences for the user.
        complete: Whether the views hold everything that the rows and the settings call for.
    """

    report: dict[str, dict[str, Any]]
    notes: list[str]
    complete: bool


def summarize(
    source: Path,
    index: RowIndex,
    failures: Failures,
    settings: ViewSettings,
    chosen: Mapping[str, Sequence[str]],
    views: Mapping[str, View],
) -> DatasetReport:
    """Finish the views; return their report, and sentences about what a user must know."""
    damaged = index.damaged + failures.damaged
    rows = sum(index.tasks.values())
    read = {
        "rows": rows,
        "failed": sum(count for (_, kind), count in index.tasks.items() if kind == FAILED),
        "replaced": index.replaced,
        "damaged_lines": damaged,
        "unfinished_lines": index.unfinished,
    }
    head = {"source": str(source), "read": read, "settings": _changed(settings)}
    tail = {"errors": failures.listed, "moved": list(index.moved)[:MAX_REPORTED_ERRORS]}
    parts = {name: view.finish() for name, view in views.items()}
    notes, complete = _notes_of_rows(index, failures), not (damaged or index.moved or index.missing_shards())
    for name, part in parts.items():
        notes += [f"{name}: {sentence}" for sentence in _sentences(part, settings)]
        complete = complete and not _NOT_COMPLETE & part["counts"].keys()
    report = {name: {**head, "tasks": list(chosen[name]), **part, **tail} for name, part in parts.items()}
    return DatasetReport(report, notes, complete)


def _changed(settings: ViewSettings) -> dict[str, Any]:
    """Return the settings that are not the default, as JSON values."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    changed = {name: value for name, value in values.items() if value != getattr(DEFAULT_SETTINGS, name)}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in changed.items() if name != "classes"
    }


def _notes_of_rows(index: RowIndex, failures: Failures) -> list[str]:
    notes = index.missing_shards()
    if damaged := index.damaged + failures.damaged:
        notes.append(_words("{n} damaged line{s} {were} left out.", damaged))
    if index.unfinished:
        notes.append("The last line is incomplete: the run was stopped, or is still writing. The rows before it count.")
    if failures.count:
        most = "" if failures.count <= MAX_REPORTED_ERRORS else f" the first {MAX_REPORTED_ERRORS:,}"
        notes.append(_words(f"{{n}} row{{s}} failed; report.json lists{most or ' the errors'}.", failures.count))
    if index.moved:
        names = listing([shown(name) for name in index.moved], first=3)
        words = "{n} id{s} stand{ends} for images at several places, and only the last row of each question counts: "
        notes.append(f"{_words(words, len(index.moved))}{names}.")
    return notes


def _sentences(part: Mapping[str, Any], settings: ViewSettings) -> list[str]:
    """Return the counts of a view in words: those of its content first."""
    counts = {name: count for name, count in part["counts"].items() if name not in _WORDS}
    head = ", ".join(f"{count:,} {_noun(name, count)}" for name, count in sorted(counts.items(), key=_order))
    sentences = [f"{head}."] if head else ["no images."]
    sentences += [_words(words, part["counts"][name]) for name, words in _WORDS.items() if name in part["counts"]]
    classes = part.get("classes", {})
    if "unmatched" in classes:
        sentences.append(_match_sentence(classes, settings.unmatched))
    return sentences


def _order(item: tuple[str, int]) -> tuple[bool, str]:
    return item[0] != "images", item[0]


def _noun(name: str, count: int) -> str:
    words = name.replace("_", " ")
    return words.removesuffix("s") if count == 1 else words


def _match_sentence(classes: Mapping[str, Any], policy: str) -> str:
    counts, labels = classes["matched"], classes["unmatched"]
    names = listing([f"{shown(label)} ({count:,})" for label, count in labels.items()], first=5)
    became = "kept as further classes" if policy == "keep" else "left out"
    rest = f", {counts['unmatched']:,} not matched and {became}: {names}" if labels else ""
    return (
        f"labels matched to classes: {counts['exact']:,} exactly, {counts['case']:,} by case and white space, "
        f"{counts['plural']:,} as plurals{rest}."
    )


def _words(words: str, count: int) -> str:
    forms = {"s": "s", "es": "es", "were": "were", "are": "are", "ends": ""}
    one = {"s": "", "es": "", "were": "was", "are": "is", "ends": "s"}
    return words.format(n=f"{count:,}", **(one if count == 1 else forms))
