"""Which boxes of an answer belong to which phrase of a sentence."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from florence2.evaluate.metrics.boxes import Corners


def boxes_of_phrases(answer: Mapping[str, Any], phrases: Sequence[str]) -> list[list[Corners]]:
    """Return the boxes of each phrase, none where the answer does not have the phrase.

    Phrases are compared without regard to case and spaces. Where a sentence has a phrase twice, the first of its groups
    of boxes in the answer belongs to the first.

    Args:
        answer: A row of `<CAPTION_TO_PHRASE_GROUNDING>`: boxes that are labelled with phrases, in the sentence's order.
        phrases: The phrases of the sentence, in its order.
    """
    groups: dict[str, list[list[Corners]]] = {}
    for label, boxes in groupby(answer.get("boxes", ()), key=lambda box: _plain(box["label"])):
        groups.setdefault(label, []).append([box["xyxy"] for box in boxes])
    return [groups[word].pop(0) if groups.get(word := _plain(phrase)) else [] for phrase in phrases]


def _plain(phrase: str) -> str:
    return "".join(phrase.casefold().split())
