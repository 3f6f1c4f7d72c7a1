"""`OnlyLabels`: constrained decoding, a rule by which an answer can say nothing but given words."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from florence2.errors import OptionError, plain, shown
from florence2.inputs.coordinates import NUM_BINS

_NEVER = float("-inf")


class TextEncoder(Protocol):
    """Anything that turns text into ids as a checkpoint's tokenizer does, such as `f.processor`."""

    def encode(self, text: str) -> list[int]:
        """Return the ids, with `<s>` first and `</s>` last."""
        ...


class OnlyLabels:
    """A rule by which every text outside of location tokens is one of the given labels.

        rule = florence2.OnlyLabels(["car", "dog", "traffic light"], f.processor)
        f.run("<OD>", "photo.jpg", extra_rules=(rule,))
        yes_or_no = florence2.OnlyLabels(["yes", "no"], f.processor, locations=0)
        f.run("Is there a dog in the image?", "photo.jpg", extra_rules=(yes_or_no,))

    An answer is a series of labels, each followed by one or more groups of `locations` location tokens, as of <OD> and
    <OPEN_VOCABULARY_DETECTION> (boxes), or by 8, as of <OCR_WITH_REGION> (quads). It may end after any group, and at
    its beginning, where nothing was found. With `locations=0` it is exactly one label. Which label, and where, remains
    the model's choice: its probabilities of the ids that the labels allow. They sum to 1 in greedy search and sampling;
    in beam search, as in the reference, the scores stay those that the model gave before any rule. With more beams than
    possible answers, further alternatives repeat one, with a `sequence_score` below -1,000,000.

    Where earlier rules forbid every id that the labels allow, such as the third id of a label that stands a second
    time, the labels win: those ids become equally likely, whatever the model thought of them. To keep its opinion, set
    `no_repeat_ngram_size=0`, which is 3 in the published checkpoints. Only an answer that the limit cuts (its
    finish_reason is "length") can end within a label. The rule looks at ids on the host, so no CUDA graph is used.
    """

    def __init__(
        self,
        labels: Iterable[str],
        tokenizer: TextEncoder,
        end: int | None = None,
        *,
        locations: int = 4,
        name: str = "only_labels",
    ):
        """Read the labels into a trie of ids.

        Args:
            labels: The words, or phrases, that may occur.
            tokenizer: The checkpoint's tokenizer or processor: `f.processor`.
            end: The id that ends an answer; None is the one that ends the tokenizer's prompts.
            locations: How many location tokens make a region, at least 0.
            name: The rule's name, which no other rule may have.

        Raises:
            OptionError: No label is given, one is empty or contains special tokens, or another argument is wrong.
        """
        self.name, self.locations = name, plain(locations)
        if isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None)):
            raise OptionError(f"tokenizer is {shown(tokenizer)}, which cannot encode text; give f.processor.")
        if type(self.locations) is not int or self.locations < 0:
            raise OptionError(f"locations is {shown(locations)}; it must be a whole number of at least 0.")
        begin, *places, closing = tokenizer.encode("".join(f"<loc_{bin}>" for bin in range(NUM_BINS)))
        self.begin, self.end, self.places = begin, closing if end is None else end, places
        self._is_place = frozenset(places)
        self.labels = _check_labels(labels)
        special = {begin, closing, self.end, *places}
        # a tokenizer may cut a word in another way where it does not begin the text
        self._first = _Trie([_encode(tokenizer, "", label, special) for label in self.labels])
        self._later = _Trie([_encode(tokenizer, "<loc_0>", label, special) for label in self.labels])

    def __repr__(self) -> str:
        return f"OnlyLabels({len(self.labels)} labels, locations={self.locations})"

    def applies(self, generated: int) -> bool:
        """Apply at every step."""
        return generated >= 0

    def __call__(self, scores: Any, sequences: Any, generated: Any) -> Any:
        """Leave only the ids that continue a label, a group of locations or an answer; see `Rule`.

        Tensors and the arrays of `florence2.lite` are read and written alike.
        """
        for row, (ids, count) in enumerate(zip(sequences.tolist(), generated.tolist(), strict=True)):
            allowed = [*dict.fromkeys(self.following(ids[1 : 1 + count]))]
            kept = scores[row, allowed]
            scores[row] = _NEVER
            # where earlier rules forbid all of them, they become equally likely
            scores[row, allowed] = -math.log(len(allowed)) if (kept == _NEVER).all() else kept
        return scores

    def following(self, ids: Sequence[int]) -> list[int]:
        """Return the ids that may follow the generated `ids`; after anything that the labels do not allow, the end."""
        if not ids:  # `<s>` comes first, where the settings do not force it anyway
            return [self.begin, *self.following([self.begin])]
        text = ids[1:] if ids[0] == self.begin else ids
        word, run = self._split(text)
        at_beginning = len(word) == len(text)
        if run:
            return self.places if run % self.locations else [*self.places, *self._later.following(()), self.end]
        words = self._first if at_beginning else self._later
        possible = words.following(word)
        if word in words.labels:
            possible = [*possible, *(self.places if self.locations else [self.end])]
        if not text and self.locations:
            possible = [*possible, self.end]
        return possible or [self.end]

    def _split(self, text: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Return the ids after the last location and 0; or nothing, and how many locations the text ends with."""
        if not self.locations:
            return tuple(text), 0
        start = len(text)
        while start and text[start - 1] not in self._is_place:
            start -= 1
        if start < len(text):
            return tuple(text[start:]), 0
        while start and text[start - 1] in self._is_place:
            start -= 1
        return (), len(text) - start


class _Trie:
    """Labels as ids: for every beginning of one, the ids that may follow it."""

    def __init__(self, labels: Iterable[tuple[int, ...]]):
        self.labels = frozenset(labels)
        self._following: dict[tuple[int, ...], list[int]] = {}
        for label in sorted(self.labels):
            for i, id in enumerate(label):
                known = self._following.setdefault(label[:i], [])
                if id not in known:
                    known.append(id)

    def following(self, beginning: tuple[int, ...]) -> list[int]:
        """Return the ids that continue a beginning; none where no label begins so, or where it ends."""
        return self._following.get(beginning, [])


def _check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels without repeats. Raises OptionError for wrong ones."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise OptionError(f"labels is {shown(labels)}; give a list of words, such as ['car', 'dog'].")
    known = tuple(dict.fromkeys(labels))
    wrong = [label for label in known if not isinstance(label, str) or not label.strip()]
    if wrong or not known:
        subject = f"the label {shown(wrong[0])}" if wrong else "an empty list of labels"
        raise OptionError(f"OnlyLabels got {subject}; give at least one label, each a text that is not empty.")
    return known


def _encode(tokenizer: TextEncoder, before: str, label: str, special: set[int]) -> tuple[int, ...]:
    """Return the ids of a label where it stands after the text `before`."""
    ids = tuple(tokenizer.encode(before + label)[len(tokenizer.encode(before)) - 1 : -1])
    if not ids or special & {*ids}:
        raise OptionError(f"The label {shown(label)} contains special tokens; give words alone.")
    return ids
