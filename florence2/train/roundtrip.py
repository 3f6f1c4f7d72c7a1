"""Send an answer through tokenizer and parser and back, and report the parts that are not read as they were written.

This reads a text more strictly than `florence2.answers.answer`, which skips what it cannot use: a model's slip should
not cost the rest of its answer, but a person wants to know about an error in the data.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from florence2.answers.answer import Answer
from florence2.answers.parsing import MARKERS
from florence2.errors import shown
from florence2.inputs.coordinates import LOCATION, NUM_BINS, bins_to_tokens, pixels_to_bins
from florence2.inputs.tasks import AnswerKind, find_task
from florence2.processor import Processor
from florence2.train.entries import DataError, check_text

_SIZE_IN_BINS = (NUM_BINS, NUM_BINS)
"""The size of an image whose pixels are bins, so that regions compare without the real size."""
_CONTROL = (*MARKERS, "<unk>", "<mask>")
_LOCATIONS = re.compile(r"((?:<loc_[0-9]+>)+)")
_OUTLINES = re.compile(r"((?:<loc_[0-9]+>|<sep>|<poly>|</poly>)+)")
_INSTANCES = re.compile(r"(?:<poly>(?:<loc_[0-9]+>|<sep>)+</poly>)+")


@dataclass(frozen=True)
class _Region:
    """A region of a text: its label, and a row of bins for each outline."""

    label: str
    rows: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{shown(self.label)} at {bins_to_tokens(self.rows[0][:4])}"


def check_answer(prefix: str, suffix: str, ids: Sequence[int], processor: Processor) -> None:
    """Raise DataError, with the first reason, when `suffix` is not read back as it was written.

    `prefix` is the prompt, which decides the kind of answer; `ids` are `processor.encode(suffix)`.
    """
    check_text("the answer", suffix)
    for token in _CONTROL:
        if token in suffix:
            raise DataError(f"{token} in an answer would end or break it; leave it out.")
    decoded = processor.decode(ids)
    if decoded != f"<s>{suffix}</s>":
        raise DataError(f"the tokenizer returns {shown(decoded)} for {shown(suffix)}.")
    task = find_task(prefix, processor.tasks)
    if task is not None and task.answer != "text":
        answer = processor.answer(task.token, decoded, image_size=_SIZE_IN_BINS)
        _compare(_read_meaning(suffix, answer.kind), _regions(answer))


def _compare(meant: Iterable[_Region], read: Sequence[_Region]) -> None:
    for written, parsed in zip_longest(meant, read):
        if written != parsed:
            raise DataError(f"{written or parsed} is not read back: the parser drops or changes this label.")


def _regions(answer: Answer) -> list[_Region]:
    """Return the parsed regions in bins, by the quantiser that makes targets."""
    boxes = [(box.label, (box.xyxy,)) for box in answer.boxes]
    quads = [(quad.label, (quad.xyxyxyxy,)) for quad in answer.quads]
    polygons = [(polygon.label, polygon.rings) for polygon in answer.polygons]
    return [
        _Region(label, tuple(tuple(pixels_to_bins(row, _SIZE_IN_BINS)) for row in rows))
        for label, rows in (*boxes, *quads, *polygons)
    ]


def _read_meaning(text: str, kind: AnswerKind) -> Iterator[_Region]:
    """Read the regions that a text of labels and locations means. Raise DataError where it cannot mean any."""
    outlined = kind == "polygons" or (kind == "boxes_or_polygons" and "<poly>" in text)
    parts = (_OUTLINES if outlined else _LOCATIONS).split(text)  # label, locations, label, locations, ..., rest
    if parts[-1].strip():
        raise DataError(f"{shown(parts[-1])} has no location after it.")
    for words, run in zip(parts[0:-1:2], parts[1::2], strict=True):
        label = words.strip()
        if kind in ("proposals", "polygons") and label:
            raise DataError(f"the label {shown(label)} does not belong there: this task answers with locations alone.")
        if kind not in ("proposals", "polygons") and not label:
            raise DataError(f"{shown(run)} has no label before it.")
        if outlined:
            yield from _read_outlines(label, run)
        else:
            yield from _read_rows(label, run, 8 if kind == "quads" else 4)


def _read_rows(label: str, run: str, length: int) -> Iterator[_Region]:
    """Read boxes (`length` 4; several may share a label) or one quad (8)."""
    bins = [int(bin) for bin in LOCATION.findall(run)]
    if len(bins) % length or (length == 8 and len(bins) != 8):
        raise DataError(
            f"{len(bins)} locations follow {shown(label)}; {'a quad' if length == 8 else 'a box'} has {length}."
        )
    for i in range(0, len(bins), length):
        row = tuple(bins[i : i + length])
        if length == 4 and (row[0] > row[2] or row[1] > row[3]):
            raise DataError(
                f"{bins_to_tokens(row)} of {shown(label)} has its corners swapped: left, top, right, bottom."
            )
        yield _Region(label, (row,))


def _read_outlines(label: str, run: str) -> Iterator[_Region]:
    """Read one object, or several with `<poly>` and `</poly>` around each; `<sep>` separates an object's outlines."""
    if "poly>" in run and not _INSTANCES.fullmatch(run):
        raise DataError(f"{shown(run)} must have <poly> before and </poly> after every object.")
    for part in run.replace("</poly>", "").split("<poly>")[1:] or [run]:
        rows = [tuple(int(bin) for bin in LOCATION.findall(ring)) for ring in part.split("<sep>")]
        for row in rows:
            if len(row) < 6 or len(row) % 2:
                raise DataError(f"an outline has {len(row)} locations; it needs x, y of at least three points.")
        yield _Region(label, tuple(rows))
