"""Generated text -> regions: labels, location bins, and where in the text they stand.

The model writes an answer as text with location tokens, such as
`</s><s>car<loc_52><loc_332><loc_932><loc_774></s>`. What is accepted follows the reference.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from florence2.inputs.coordinates import LOCATION
from florence2.inputs.tasks import AnswerKind
from florence2.inputs.tokenizer import ADDED_TOKENS

RegionShape: TypeAlias = Literal["box", "quad", "polygon"]
MARKERS = ("<s>", "</s>", "<pad>")
"""What surrounds an answer and is no part of it."""

_LOC = r"<loc_\d+>"
_OUTLINE = rf"(?:{_LOC}|<sep>|<poly>|</poly>)"
_BOX = re.compile(rf"(?:{_LOC}){{4}}")
_BOXES = re.compile(rf"(?:{_LOC}){{4,}}")
# The look behind keeps a long text without locations from being tried again from each of its letters.
_LABELLED_BOXES = re.compile(rf"(?<![^<>])[^<]+(?:{_LOC}){{4,}}")
_QUAD = re.compile(rf"(.+?)((?:{_LOC}){{8}})")
_QUADS = re.compile(rf"(?:{_LOC}){{8,}}")
_OUTLINES = re.compile(rf"{_OUTLINE}{{4,}}")
_LABELLED_OUTLINES = re.compile(rf"(?<![^<>])[^<]+{_OUTLINE}{{4,}}")
_INSTANCE = re.compile(r"<poly>(.*?)</poly>")
_RING = re.compile(rf"((?:{_LOC})+)(?:<sep>|$)")
# A label stands before the first tag of its phrase; one with a line break inside is no label, and spoils the phrase.
_LABEL = re.compile(r"\s*(.*?)(?=<loc_|<poly>)")
_STRAY_LOCATION = re.compile(r"loc_\d+>")
_TAGS = re.compile("|".join(map(re.escape, (*MARKERS, *ADDED_TOKENS))))
# what parsing leaves of a tag before a label: its "<" cannot be part of one
_STRAY_TAG = re.compile("|".join([r"loc_\d+>"] + [re.escape(t[1:]) for t in ADDED_TOKENS if not t.startswith("<loc_")]))

# Words that ground nothing. A phrase that is exactly one of them is dropped.
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
    """One box, quad or set of outlines as the text has it.

    `bins` is one row for a box or quad, one per outline for a polygon; `positions` are those of its location tokens'
    characters in the text. What the reference counts its scores by is `phrase`, how many characters of phrases come
    before its own, and `inside`, where its first row stands, counted from where its phrase begins.
    """

    shape: RegionShape
    label: str
    bins: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    phrase: int
    inside: tuple[int, int]


def find_regions(kind: AnswerKind, text: str) -> list[Region]:
    """Everything of the given kind in a generated text, in order; of a "text" nothing."""
    if kind == "text":
        return []
    if kind == "quads":
        return list(_find_quads(*remove_markers(text, ("<s>",))))
    cleaned = remove_markers(text)
    if kind == "polygons":
        return list(_find_outlines(_OUTLINES, *cleaned))
    if kind == "boxes_or_polygons" and "<poly>" in text:
        return list(_find_outlines(_LABELLED_OUTLINES, *cleaned))
    return list(_find_boxes(kind, *cleaned))


def find_region_tokens(kind: AnswerKind, token_texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Which tokens each region of an answer was read from, in the answer's order.

    `token_texts` as in `Answer`, the start id's first; tokens are counted without it, as log-probabilities are. They
    are the location tokens alone: those by whose probabilities the score is computed.
    """
    # The text put together from its tokens. Letters spread over several tokens look different in it than in the
    # answer's, but location tokens, and so the regions found, are the same; and it is known which token each is.
    owners = [i for i, piece in enumerate(token_texts) for _ in piece]
    regions = find_regions(kind, "".join(token_texts))
    return [tuple(sorted({owners[position] - 1 for position in region.positions})) for region in regions]


def remove_markers(text: str, markers: Sequence[str] = MARKERS) -> tuple[str, Sequence[int]]:
    """`text` without the markers, one after another, and for every character left its position before."""
    origin: Sequence[int] = range(len(text))
    for marker in markers:
        if marker in text:
            parts = text.split(marker)
            starts = [sum(map(len, parts[:i])) + i * len(marker) for i in range(len(parts))]
            origin = [origin[s + k] for s, part in zip(starts, parts, strict=True) for k in range(len(part))]
            text = "".join(parts)
    return text, origin


def clean_label(label: str) -> str:
    """A label without the remains of tags."""
    label = _TAGS.sub("", label)
    while stray := _STRAY_TAG.match(label):
        label = label[stray.end() :]
    return label.strip()


def _find_boxes(kind: AnswerKind, text: str, origin: Sequence[int]) -> Iterator[Region]:
    """Phrases of a label and at least four locations; every four are a box of that label, a rest is dropped."""
    before = 0
    for phrase in (_BOXES if kind == "proposals" else _LABELLED_BOXES).finditer(text):
        label = _read_label(phrase.group())
        if label is not None and not (kind == "phrases" and label in _UNGROUNDED):
            for box in _BOX.finditer(phrase.group()):
                yield _region("box", label, text, origin, phrase.start(), [box.span()], before)
        before += len(phrase.group())


def _find_quads(text: str, origin: Sequence[int]) -> Iterator[Region]:
    """Eight locations after a line of text, of which there must be at least one character."""
    last = max((run.end() for run in _QUADS.finditer(text)), default=0)
    for quad in _QUAD.finditer(text, 0, last):  # behind it there is none, and looking from every letter takes long
        yield _region("quad", quad.group(1), text, origin, 0, [quad.span(2)])


def _find_outlines(pattern: re.Pattern[str], text: str, origin: Sequence[int]) -> Iterator[Region]:
    """Phrases of outlines: `<poly>` ... `</poly>` around each object where both occur, `<sep>` between its rings."""
    for phrase in pattern.finditer(text):
        words = phrase.group()
        stray = _STRAY_LOCATION.match(words)  # what is left of a location token whose "<" ended the phrase before
        label = _read_label(words[stray.end() :] if stray else words)
        if label is None:
            continue
        wrapped = "<poly>" in words and "</poly>" in words
        parts = [(part.group(1), part.start(1)) for part in _INSTANCE.finditer(words)] if wrapped else [(words, 0)]
        for part, offset in parts:
            rings = [(offset + ring.start(1), offset + ring.end(1)) for ring in _RING.finditer(part)]
            if rings:
                yield _region("polygon", label, text, origin, phrase.start(), rings)


def _region(
    shape: RegionShape,
    label: str,
    text: str,
    origin: Sequence[int],
    start: int,
    rows: Sequence[tuple[int, int]],
    phrase: int = 0,
) -> Region:
    """The region whose `rows` of locations stand at these places of `text`, counted from `start`."""
    bins = [[int(bin) for bin in LOCATION.findall(text, start + first, start + last)] for first, last in rows]
    # a coordinate without its partner is dropped
    pairs = tuple(tuple(row[: len(row) // 2 * 2]) for row in bins)
    positions = tuple(origin[start + i] for first, last in rows for i in range(first, last))
    return Region(shape, label, pairs, positions, phrase, rows[0])


def _read_label(phrase: str) -> str | None:
    found = _LABEL.match(phrase)
    return found.group().strip() if found else None
