"""Find the regions in a generated text: their labels, location bins, and positions in the text.

The model writes an answer as text with location tokens, such as
`</s><s>car<loc_52><loc_332><loc_932><loc_774></s>`. The grammar is the reference's. Its patterns try every letter as
the start of a label, which takes quadratic time on some texts; here runs of tags are found first, then their labels, in
linear time.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

from florence2.inputs.coordinates import LOCATION
from florence2.inputs.tasks import AnswerKind
from florence2.inputs.tokenizer import ADDED_TOKENS

RegionShape: TypeAlias = Literal["box", "quad", "polygon"]
MARKERS = ("<s>", "</s>", "<pad>")
"""The special tokens around an answer, which are not part of its text."""

_LOC = r"<loc_[0-9]{1,4}>"
_OUTLINE = rf"(?:{_LOC}|<sep>|<poly>|</poly>)"
_BOX = re.compile(rf"(?:{_LOC}){{4}}")
_BOXES = re.compile(rf"(?:{_LOC}){{4,}}")
_QUAD = re.compile(rf"(?:{_LOC}){{8}}")
_OUTLINES = re.compile(rf"{_OUTLINE}{{4,}}")
_LINE = re.compile(r".+")
_RING = re.compile(rf"(?:{_LOC})+")
_LABEL_END = re.compile(r"<loc_|<poly>")
_STRAY_LOCATION = re.compile(r"loc_[0-9]+>")
_OTHER_TOKENS = [token for token in ADDED_TOKENS if not LOCATION.fullmatch(token)]
_TAGS = re.compile("|".join([r"<loc_(?:0|[1-9][0-9]{0,2})>", *map(re.escape, (*MARKERS, *_OTHER_TOKENS))]), re.ASCII)
# The rest of tags before a label: a label cannot contain "<", so the match begins after it.
_STRAY_TAGS = re.compile("(?:" + "|".join([r"loc_[0-9]+>", *(re.escape(token[1:]) for token in _OTHER_TOKENS)]) + ")*")

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

    `bins` has one row for a box or quad, and one for each outline of a polygon. `positions` are, row by row, the
    positions of its location tokens' characters in the text; `label_positions` those of its label's characters.
    """

    shape: RegionShape
    label: str
    bins: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    label_positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class WrittenRegion:
    """A region and the tokens that wrote it, as indices that fit the answer's log-probabilities.

    `label` are the tokens of its label, without markers; `rows` its location tokens, in rows like `Region.bins`.
    """

    region: Region
    label: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]


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
        return list(_find_polygons((run.span() for run in _OUTLINES.finditer(cleaned.text)), cleaned))
    if kind == "boxes_or_polygons" and "<poly>" in text:
        return list(_find_polygons(_find_labelled(_OUTLINES, cleaned.text), cleaned))
    phrases = find_box_phrases(kind, cleaned.text)
    return [
        _region("box", phrase.label, cleaned, [box], (phrase.span[0], phrase.boxes[0][0]))
        for phrase in phrases
        if phrase.label is not None
        for box in phrase.boxes
    ]


def find_region_tokens(kind: AnswerKind, token_texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the indices of each region's location tokens, in the order of `find_regions`.

    `token_texts` are those of `Answer` and begin with the start id's. The indices do not count it, so they fit the
    log-probabilities.
    """
    return [tuple(sorted({i for row in written.rows for i in row})) for written in find_written(kind, token_texts)]


def find_written(kind: AnswerKind, token_texts: Sequence[str]) -> list[WrittenRegion]:
    """Return each region with the tokens that wrote it, in the order of `find_regions`; `token_texts` as above."""
    # Letters spread over several tokens look different in the joined text than in the answer's, but the location
    # tokens, and so the regions, are the same; and here the token of each character is known.
    owners = [i for i, token_text in enumerate(token_texts) for _ in token_text]

    def tokens(positions: Iterable[int]) -> tuple[int, ...]:
        return tuple(owner - 1 for owner in dict.fromkeys(owners[position] for position in positions))

    return [
        WrittenRegion(
            region,
            # a quad's label may hold "</s>", which `clean_label` removes
            tuple(i for i in tokens(region.label_positions) if i >= 0 and token_texts[i + 1] not in MARKERS),
            tuple(map(tokens, region.positions)),
        )
        for region in find_regions(kind, "".join(token_texts))
    ]


def find_box_phrases(kind: AnswerKind, text: str) -> Iterator[BoxPhrase]:
    """Find phrases of a label and at least four locations in a text without markers.

    Every four locations are a box; one to three that remain are dropped. Proposals have empty labels.
    """
    proposals = (run.span() for run in _BOXES.finditer(text))
    for span in proposals if kind == "proposals" else _find_labelled(_BOXES, text):
        label = _read_label(text[slice(*span)])
        ignored = kind == "phrases" and label in _UNGROUNDED
        boxes = tuple(box.span() for box in _BOX.finditer(text, *span))
        yield BoxPhrase(None if ignored else label, span, boxes)


def remove_markers(text: str, markers: Sequence[str] = MARKERS) -> CleanText:
    """Return `text` without the markers, which are removed one after another."""
    positions: Sequence[int] = range(len(text))
    for marker in markers:
        if marker in text:
            parts = text.split(marker)
            starts = accumulate((len(part) + len(marker) for part in parts[:-1]), initial=0)
            positions = [positions[s + k] for s, part in zip(starts, parts, strict=True) for k in range(len(part))]
            text = "".join(parts)
    return CleanText(text, positions)


def clean_label(label: str) -> str:
    """Return a label without whole tags, the rest of a tag at its start, and surrounding space."""
    return _STRAY_TAGS.sub("", _TAGS.sub("", label), count=1).strip()


def _find_labelled(tags: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield the span of each label together with the run of `tags` after it.

    A label begins after the last "<" or the last run. A run without a label loses its first tag: as in the reference,
    the rest of that tag is taken for the label.
    """
    end = 0
    for run in tags.finditer(text):
        start = max(end, text.rfind("<", end, run.start()) + 1)
        if start == run.start():
            if not tags.match(text, text.index(">", start) + 1):
                continue  # too few tags remain
            start += 1
        end = run.end()
        yield start, end


def _find_quads(cleaned: CleanText) -> Iterator[Region]:
    """Find groups of eight locations after at least one character of text in the same line."""
    for line in _LINE.finditer(cleaned.text):
        start = line.start()
        while quad := _QUAD.search(cleaned.text, start + 1, line.end()):
            label = start, quad.start()
            yield _region("quad", cleaned.text[slice(*label)], cleaned, [quad.span()], label)
            start = quad.end()


def _find_polygons(phrases: Iterable[tuple[int, int]], cleaned: CleanText) -> Iterator[Region]:
    """Find polygons: in `<poly>` ... `</poly>` where a phrase has both, with `<sep>` between their outlines."""
    for phrase in phrases:
        words = cleaned.text[slice(*phrase)]
        stray = _STRAY_LOCATION.match(words)  # the rest of a location token whose "<" ended the phrase before
        label = _read_label(words[stray.end() :] if stray else words)
        if label is None:
            continue
        tag = _LABEL_END.search(words, stray.end() if stray else 0)
        written = phrase[0] + (stray.end() if stray else 0), phrase[0] + (tag.start() if tag else 0)
        wrapped = "<poly>" in words and "</poly>" in words
        for part in _find_instances(cleaned.text, phrase) if wrapped else [phrase]:
            if rings := list(_find_rings(cleaned.text, part)):
                yield _region("polygon", label, cleaned, rings, written)


def _find_instances(text: str, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the spans between `<poly>` and the next `</poly>`."""
    start, end = span
    while (opened := text.find("<poly>", start, end)) >= 0 and (closed := text.find("</poly>", opened, end)) >= 0:
        yield opened + len("<poly>"), closed
        start = closed


def _find_rings(text: str, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the spans of the runs of locations before `<sep>` and at the end."""
    for run in _RING.finditer(text, *span):
        if run.end() == span[1] or text.startswith("<sep>", run.end()):
            yield run.span()


def _region(
    shape: RegionShape,
    label: str,
    cleaned: CleanText,
    spans: Sequence[tuple[int, int]],
    label_span: tuple[int, int],
) -> Region:
    """Make the region whose rows of locations, and whose label, have these spans in the cleaned text."""
    rows = [[int(bin) for bin in LOCATION.findall(cleaned.text, *span)] for span in spans]
    bins = tuple(tuple(row[: len(row) // 2 * 2]) for row in rows)  # an x without its y is dropped
    positions = tuple(tuple(cleaned.positions[i] for i in range(*span)) for span in spans)
    return Region(shape, label, bins, positions, tuple(cleaned.positions[i] for i in range(*label_span)))


def _read_label(phrase: str) -> str | None:
    """Return the text before the first tag; None where it holds a line break, which a label cannot."""
    tag = _LABEL_END.search(phrase)
    label = phrase[: tag.start()].lstrip() if tag else "\n"
    return None if "\n" in label else label.rstrip()
