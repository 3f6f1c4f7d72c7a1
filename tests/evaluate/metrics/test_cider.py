"""CIDEr-D, against the scores of pycocoevalcap that `python -m parity.record_metrics` recorded."""

import math

import pytest

from florence2.evaluate.metrics.cider import cider_d
from florence2.evaluate.metrics.penn import split_captions
from parity.record_metrics import caption_cases
from parity.records import read_record

CASES = caption_cases()


@pytest.mark.parametrize("name", CASES)
def test_recorded(name: str) -> None:
    captions, references = CASES[name]
    scores = cider_d(split_captions(captions), [split_captions(each) for each in references])
    expected = read_record("evaluate/cider.json")[name]
    assert len(scores) == len(expected)
    assert max(abs(score - other) for score, other in zip(scores, expected, strict=True)) < 1e-9


def test_by_hand() -> None:
    """Each n-gram is in one image of two, so all weigh log 2; a perfect caption has 10 for each n."""
    captions = ["a b c d".split(), "e f g h".split()]
    assert cider_d(captions, [[captions[0]], [captions[1]]]) == pytest.approx([10, 10])


def test_length_is_penalised() -> None:
    """Without any 2-gram more, a caption of one word and its reference of two differ by one bigram."""
    score, _ = cider_d([["a"], ["c"]], [[["a", "b"]], [["c"]]])
    assert score == pytest.approx(10 * math.exp(-1 / 72) * (1 / math.sqrt(2)) / 4)


def test_words_in_every_image_weigh_nothing() -> None:
    assert cider_d([["a"], ["a"]], [[["a"]], [["a"]]]) == [0, 0]


def test_an_image_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="references"):
        cider_d([["a"], ["b"]], [[["a"]], []])


def test_some_images_of_a_corpus_have_the_scores_that_they_have_among_all() -> None:
    captions, references = CASES["many"]
    words, truths = split_captions(captions[:50]), [split_captions(each) for each in references[:50]]
    assert cider_d(words[:20], truths[:20], truths) == cider_d(words, truths)[:20] != cider_d(words[:20], truths[:20])
