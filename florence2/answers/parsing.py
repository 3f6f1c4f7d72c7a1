"""Find the regions in a generated text: their labels, location bins, and positions in the text.

The model writes an answer as text with location tokens, such as
`</s><s>car<loc_52><loc_332><loc_932><loc_774></s>`. The grammar is the reference's.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from florence2.inputs.coordinates import LOCATION
from florence2.inputs.tasks import AnswerKind
from florence2.inputs.tokenizer import ADDED_TOKENS

RegionShape: TypeAlias = Literal["box", "quad", "polygon"]
MARKERS = ("<s>", "</s>", "<pad>")
"""The special tokens around an answer, which are not part of its text."""

_LOC = r"<loc_\d+>"
_OUTLINE = rf"(?:{_LOC}|<sep>|<poly>|</poly>)"
_BOX = re.compile(rf"(?:{_LOC}){{4}}")
_BOXES = re.compile(rf"(?:{_LOC}){{4,}}")
# Without the lookbehind, a long text without locations would be searched again from each of its letters.
_LABELLED_BOXES = re.compile(rf"(?<![^<>])[^<]+(?:{_LOC}){{4,}}")
_QUAD = re.compile(rf"(.+?)((?:{_LOC}){{8}})")
_QUADS = re.compile(rf"(?:{_LOC}){{8,}}")
_OUTLINES = re.compile(rf"{_OUTLINE}{{4,}}")
_LABELLED_OUTLINES = re.compile(rf"(?<![^<>])[^<]+{_OUTLINE}{{4,}}")
_INSTANCE = re.compile(r"<poly>(.*?)</poly>")
_RING = re.compile(rf"((?:{_LOC})+)(?:<sep>|$)")
# A label ends at the first tag of its phrase. It cannot contain a line break; such a phrase has no label.
_LABEL = re.compile(r"\s*(.*?)(?=<loc_|<poly>)")
_STRAY_LOCATION = re.compile(r"loc_\d+>")
_TAGS = re.compile("|".join(map(re.escape, (*MARKERS, *ADDED_TOKENS))))
# The rest of a tag before a label: a label cannot contain "<", so the match begins after it.
_STRAY_TAG = re.compile("|".join([r"loc_\d+>"] + [re.escape(t[1:]) for t in ADDED_TOKENS if not t.startswith("<loc_")]))

# Phrases that name no object. The reference drops a phrase that equals one of them.
_UNGROUNDED = frozenset(
    """
    I me mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
    hers herself it its itself they them their theirs themselves one oneself this that these those who whom whose
    which what all another any anybody anyone anything each everybody everyone everything few many nobody none
    several some somebody someone something image images the a an lots
    """.split()
) | {"each other", "one another", "the image", "a group", "other objects", "a set"}


@dataclass(frozen=True)
class Region:
    """One box, quad or polygon as the text has it.

    `bins` has one row for a box or quad, and one for each outline of a polygon. `positions` are the positions of its
    location tokens' characters in the text.
    """

    shape: RegionShape
    label: str
    bins: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]


class CleanText(NamedTuple):
    """A text without markers, and for each of its characters the position in the original text."""

    text: str
    positions: Sequence[int]


class BoxPhrase(NamedTuple):
    """A label and its boxes, as spans (start, end) of the text. A phrase whose `label` is None must be ignored."""

    label: str | None
    span: tuple[int, int]
    boxes: tuple[tuple[int, int], ...]


def find_regions(kind: AnswerKind, text: str) -> list[Region]:
    """Return all regions of the given kind in a generated text, in order; a "text" has none."""
    if kind == "text":
        return []
    if kind == "quads":  # as in the reference, "</s>" and "<pad>" stay part of a line's label, and nothing is stripped
        return list(_find_quads(remove_markers(text, ("<s>",))))
    cleaned = remove_markers(text)
    if kind == "polygons":
        return list(_find_polygons(_OUTLINES, cleaned))
    if kind == "boxes_or_polygons" and "<poly>" in text:
        return list(_find_polygons(_LABELLED_OUTLINES, cleaned))
    phrases = find_box_phrases(kind, cleaned.text)
    return [
        _region("box", phrase.label, cleaned, [box])
        for phrase in phrases
        if phrase.label is not None
        for box in phrase.boxes
    ]


def find_region_tokens(kind: AnswerKind, token_texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the indices of each region's location tokens, in the order of `find_regions`.

    `token_texts` are those of `Answer` and begin with the start id's. The indices do not count it, so they fit the
    log-probabilities.
    """
    # Letters spread over several tokens look different in the joined text than in the answer's, but the location
    # tokens, and so the regions, are the same; and here the token of each character is known.
    owners = [i for i, token_text in enumerate(token_texts) for _ in token_text]
    regions = find_regions(kind, "".join(token_texts))
    return [tuple(sorted({owners[position] - 1 for position in region.positions})) for region in regions]


def find_box_phrases(kind: AnswerKind, text: str) -> Iterator[BoxPhrase]:
    """Find phrases of a label and at least four locations in a text without markers.

    Every four locations are a box; one to three that remain are dropped. Proposals have empty labels.
    """
    for match in (_BOXES if kind == "proposals" else _LABELLED_BOXES).finditer(text):
        label = _read_label(match.group())
        ignored = kind == "phrases" and label in _UNGROUNDED
        boxes = tuple(box.span() for box in _BOX.finditer(text, *match.span()))
        yield BoxPhrase(None if ignored else label, match.span(), boxes)


def remove_markers(text: str, markers: Sequence[str] = MARKERS) -> CleanText:
    """Return `text` without the markers, which are removed one after another."""
    positions: Sequence[int] = range(len(text))
    for marker in markers:
        if marker in text:
            parts = text.split(marker)
            starts = [sum(map(len, parts[:i])) + i * len(marker) for i in range(len(parts))]
            positions = [positions[s + k] for s, part in zip(starts, parts, strict=True) for k in range(len(part))]
            text = "".join(parts)
    return CleanText(text, positions)


def clean_label(label: str) -> str:
    """Return a label without whole tags, the rest of a tag at its start, and surrounding space."""
    label = _TAGS.sub("", label)
    while stray := _STRAY_TAG.match(label):
        label = label[stray.end() :]
    return label.strip()


def _find_quads(cleaned: CleanText) -> Iterator[Region]:
    """Find groups of eight locations after at least one character of text in the same line."""
    # No quad can end after the last eight locations. Searching there from every letter would take quadratic time.
    last = max((run.end() for run in _QUADS.finditer(cleaned.text)), default=0)
    for quad in _QUAD.finditer(cleaned.text, 0, last):
        yield _region("quad", quad.group(1), cleaned, [quad.span(2)])


def _find_polygons(pattern: re.Pattern[str], cleaned: CleanText) -> Iterator[Region]:
    """Find polygons: in `<poly>` ... `</poly>` where a phrase has both, with `<sep>` between their outlines."""
    for phrase in pattern.finditer(cleaned.text):
        words = phrase.group()
        stray = _STRAY_LOCATION.match(words)  # the rest of a location token whose "<" ended the phrase before
        label = _read_label(words[stray.end() :] if stray else words)
        if label is None:
            continue
        wrapped = "<poly>" in words and "</poly>" in words
        parts = [part.span(1) for part in _INSTANCE.finditer(words)] if wrapped else [(0, len(words))]
        for start, end in parts:
            offset = phrase.start() + start
            rings = [(offset + ring.start(1), offset + ring.end(1)) for ring in _RING.finditer(words[start:end])]
            if rings:
                yield _region("polygon", label, cleaned, rings)


def _region(shape: RegionShape, label: str, cleaned: CleanText, spans: Sequence[tuple[int, int]]) -> Region:
    """Make the region whose rows of locations have these spans in the cleaned text."""
    rows = [[int(bin) for bin in LOCATION.findall(cleaned.text, *span)] for span in spans]
    bins = tuple(tuple(row[: len(row) // 2 * 2]) for row in rows)  # an x without its y is dropped
    positions = tuple(cleaned.positions[i] for start, end in spans for i in range(start, end))
    return Region(shape, label, bins, positions)


def _read_label(phrase: str) -> str | None:
    label = _LABEL.match(phrase)
    return label.group().strip() if label else None
