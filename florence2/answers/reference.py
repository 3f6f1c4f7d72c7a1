"""Reproduce the dict that the reference implementation's `post_process_generation` returns, with its quirks.

The quirks: labels of boxes lose their non-ASCII letters, labels keep the remains of tags, and scores of boxes can come
from the wrong tokens. `Answer` has none of them.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from florence2.answers.confidence import mean_probability
from florence2.answers.parsing import find_box_phrases, find_regions, remove_markers
from florence2.inputs.coordinates import bins_to_pixels
from florence2.inputs.tasks import AnswerKind


def reference_answer(kind: AnswerKind, raw_text: str, image_size: tuple[int, int]) -> Any:
    """Return the reference's reading of a generated text, without scores: a str, or a dict of lists.

    `image_size` is (width, height) in pixels.
    """
    if kind == "text":
        return remove_markers(raw_text, ("<s>", "</s>")).text  # the reference keeps "<pad>"
    regions = find_regions(kind, raw_text)
    rows = [[bins_to_pixels(bins, image_size) for bins in region.bins] for region in regions]
    labels = [region.label for region in regions]
    if kind == "quads":
        return {"quad_boxes": [row[0] for row in rows], "labels": labels}
    if kind == "polygons":
        return {"polygons": rows, "labels": labels}
    # Not stripped afterwards: the reference strips labels before it drops their letters.
    ascii_labels = [label.encode("ascii", errors="ignore").decode("ascii") for label in labels]
    boxes = [row[0] for row in rows]
    if kind == "boxes_or_polygons":
        empty: dict[str, Any] = {"bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []}
        if "<poly>" in raw_text:
            return empty | {"polygons": rows, "polygons_labels": labels}
        return empty | {"bboxes": boxes, "bboxes_labels": ascii_labels}
    return {"bboxes": boxes, "labels": ascii_labels}


def reference_scores(token_texts: Sequence[str], token_logprobs: Sequence[float]) -> list[float | None]:
    """Return the reference's scores of the boxes of an answer of kind "boxes".

    `token_texts` begins with the start id's text, which has no log-probability.
    """
    texts = token_texts[1:]
    ends = list(itertools.accumulate(len(text) for text in texts))
    starts = [0, *ends[:-1]]
    scores = []
    for first, last in _looked_up_spans("".join(texts)):
        tokens = range(bisect.bisect_right(ends, first), bisect.bisect_left(starts, last))  # those that overlap
        scores.append(mean_probability([token_logprobs[i] for i in tokens]))
    return scores


def _looked_up_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the reference looks for the tokens of each box, as (start, end) in the generated text.

    It adds up the lengths of the phrases before a box instead of taking the phrase's position. Where there is text
    between phrases, it therefore looks too early.
    """
    assumed = len("<s>") if text.startswith("<s>") else 0
    for phrase in find_box_phrases("boxes", remove_markers(text).text):
        start, end = phrase.span
        if phrase.label is not None:
            yield from ((assumed + first - start, assumed + last - start) for first, last in phrase.boxes)
        assumed += end - start
